"""Data: named sets, files and hub data sets as examples, and examples as padded tokens."""
