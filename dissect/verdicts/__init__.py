"""Run the stress tests and apply the decision rule."""
