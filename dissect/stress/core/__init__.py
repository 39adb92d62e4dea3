"""What every stress test shares: facts, distractors, scores and results."""
