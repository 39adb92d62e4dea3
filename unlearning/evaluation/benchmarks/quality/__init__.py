"""Text quality of what a model writes."""
