"""Losses as pure functions, the forward passes that feed them, and the combination of forget and retain loss."""
