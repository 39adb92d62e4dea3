"""Who's Harry Potter (arXiv 2310.02238): anchors, translation, generic labels; all of it but the training."""
