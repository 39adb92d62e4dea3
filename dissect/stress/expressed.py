"""What the models still say, unattacked: the bottom of the claim ladder, and what everything else is compared with."""

import time

import numpy as np

from dissect.stress.case import Case
from dissect.stress.result import PLAIN, StressResult, value_rows
from dissect.stress.scores import MEASURES, RANK_FLOOR, score_facts


def expressed(case: Case) -> StressResult:
    """The answers' probability under each model as it is.

    Measures: `probability`, which decides: the geometric mean of the probabilities of an answer's tokens (TOFU's, in
    [0, 1]); and the `rank`, `logprob` and `correct` of `dissect.stress.scores`.

    Args:
        case: models and facts.
    """
    started = time.perf_counter()
    measured = []
    for role, model in case.models.items():
        columns = score_facts(model, case.forget, batch_size=case.batch_size).columns()
        measured.append((role, PLAIN, {"probability": np.exp(columns["logprob"]), **columns}))
    return StressResult(
        test="expressed",
        rung=0,
        measure="probability",
        frame=value_rows(case.forget, measured),
        proves=(
            "Above zero, the model still gives the answers more probability than one that never knew. None says "
            "nothing of what is inside."
        ),
        settings={"measures": ["probability", *MEASURES]},
        seconds=time.perf_counter() - started,
        floors={"rank": RANK_FLOOR},
        seed=case.seed,
    )
