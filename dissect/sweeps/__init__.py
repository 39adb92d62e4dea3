"""Patch and restore layer by layer."""
