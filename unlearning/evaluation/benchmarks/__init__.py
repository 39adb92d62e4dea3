"""Benchmarks of `unlearn eval`: what is read, asked and summed up."""
