"""Reading training and evaluation text: one file per format, and the one answer boundary."""
