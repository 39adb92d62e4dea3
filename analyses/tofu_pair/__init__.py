"""Build a pair of models on real TOFU text, and give its verdicts."""
