"""Unlearn ever more, and again and again (MUSE)."""
