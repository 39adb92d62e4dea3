"""Trade forget quality against utility (TOFU)."""
