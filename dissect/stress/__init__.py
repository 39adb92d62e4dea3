"""Stress tests: can knowledge that a model no longer shows be brought back, or still be read inside the model?

Every test treats three models alike, base, unlearned and control, and returns a `StressResult`: what each of them
scores under the test, example by example, and the residual

    rho = (attacked unlearned - attacked control) / (base - control)

Without a control, a test is compared with the score of a model without the knowledge, where that score is known
(`StressResult.floors`).
"""
