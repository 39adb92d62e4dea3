"""Do the methods that were made to resist relearning resist it more than the others?

Every method forgets down to a common level; then each model is attacked, and so is a control that never knew.

    OUT/WORLD/models/METHOD-seedN/  runs of `unlearn train`
    OUT/WORLD/METHOD-seedN.json     what the attacks on that model found; a stopped study continues
    OUT/curves.csv, models.csv      one row per attack, rate and number of steps; one row per model
    OUT/table.md                    means over the seeds, for a reader
    OUT/figures/resistance.*
"""
