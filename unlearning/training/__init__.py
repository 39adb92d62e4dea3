"""Train a model with one of the methods."""
