"""Reproduce the claims of the papers: one package per claim, run as `python -m analyses.NAME`."""
