"""Find, load, hash and save checkpoints."""
