"""Familiarity with a text (Who's Harry Potter)."""
