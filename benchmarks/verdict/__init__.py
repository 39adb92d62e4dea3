"""What a verdict costs: CPU seconds by test and by model, wall time, and peak memory."""
