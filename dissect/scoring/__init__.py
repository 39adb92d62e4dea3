"""Score logits: KRS and the other recovery scores, and their intervals."""
