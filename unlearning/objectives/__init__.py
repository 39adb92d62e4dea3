"""Losses and gradients."""
