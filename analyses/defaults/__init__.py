"""Does every unlearning method forget with its defaults alone?

Every method on a base, with no option set: what it leaves of the forget and of the retain answers.

    OUT/WORLD/METHOD.json    what a method did; a stopped study continues
    OUT/table.csv, table.md  all of them
"""
