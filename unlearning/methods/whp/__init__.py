"""Who's Harry Potter (arXiv 2310.02238): anchors, translation, generic labels, and the method that trains on them."""
