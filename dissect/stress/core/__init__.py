"""Shared parts of the stress tests: case, facts, distractors, scores, edits and results."""
