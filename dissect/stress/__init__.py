"""Stress tests: does knowledge that a model no longer shows come back, or can it still be read?

Every test asks the same of three models, base, unlearned and never, and gives `StressResult`: what each of them scores
under the test, example by example, and the residual

    rho = (attacked unlearned - attacked never) / (base - never)

A test without a never model is compared with what knowing nothing scores, where that is known (`StressResult.floors`).
"""
