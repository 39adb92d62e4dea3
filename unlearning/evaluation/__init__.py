"""What a model says: generation, and metrics as pure functions."""
