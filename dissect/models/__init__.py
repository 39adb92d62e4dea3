"""Load models and describe their parts: blocks, sites, weights."""
