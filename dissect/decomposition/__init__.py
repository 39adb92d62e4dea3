"""Decompose the change of each linear module into weights, coefficients and their interaction."""
