"""ConceptVectors."""
