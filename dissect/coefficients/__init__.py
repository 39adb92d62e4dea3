"""Probe the coefficients of the MLPs: how far they moved, and what restoring them brings back."""
