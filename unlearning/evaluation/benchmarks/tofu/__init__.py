"""The TOFU benchmark."""
