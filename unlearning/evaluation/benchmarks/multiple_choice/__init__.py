"""Multiple-choice questions, WMDP among them."""
