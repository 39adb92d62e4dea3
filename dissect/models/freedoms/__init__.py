"""Freedoms in how a model's weights are written: what they are, and where a model may have them."""
