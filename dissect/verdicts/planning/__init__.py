"""How many people, facts and controls a verdict takes, planned on simulated models.

A verdict's score is the largest of several residuals (`dissect.verdicts.rule`). In the plan, the residuals of the
rule's entries, for a model that holds a share s of the people, are jointly normal:

    rho = s known + (1 - s) unknown + N(0, f (between / people + within / facts)) + N(0, f run_sd^2)

`known` and `unknown` are the mean residuals over people whom such a model knows and does not know. Who is known is
known with all facts, so `between` has s (1 - s) (known - unknown)^2 more. The last term is common to all entries: two
models without the knowledge, trained on the same texts in another order, differ by it. With k controls, the control's
half of the variance is that of a mean of k: f = (1 + 1 / k) / 2, as in `dissect.verdicts.spread`. Without a control,
f = 1, and the numbers are those of the score without a control. The verdict's interval is computed for many such
models, as the rule computes it, on fixed random numbers; so a plan is reproducible, and smooth in people and controls.

    populations    what residuals are for known and unknown people, and how they vary; the numbers that ship
    measure        the same from the results of tests
    simulation     intervals of the scores of simulated models
    needs          the fewest people and controls that do
    plan           all of it for the people, facts and controls at hand

What a plan does not know: attacks that do not take hold, utility, and the tests outside the score.
"""
