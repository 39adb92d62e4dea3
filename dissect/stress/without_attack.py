"""What the models still say, unattacked: the bottom of the claim ladder, and what everything else is compared with."""

import time

import numpy as np
from jaxtyping import Float

from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.result import PLAIN, StressResult, value_rows
from dissect.stress.core.scores import MEASURES, RANK_FLOOR, all_answers, fact_scores, right_places
from unlearning.evaluation.metrics.truth_ratio import knowledge_truth_ratio, log_truth_ratio


def without_attack(case: Case) -> StressResult:
    """The answers' probability under each model as it is.

    Measures: `probability`, which decides: the geometric mean of the probabilities of an answer's tokens (TOFU's, in
    [0, 1]); the knowledge truth ratio p(right) / (p(right) + p(wrong)) of 2506.12618, p(wrong) the geometric mean over
    the wrong answers, a half where nothing is known; and `rank`, `logprob` and
    `correct` of `dissect.stress.core.scores`. Without a never model the probability is a share of the base's.

    Args:
        case: models and facts.
    """
    started = time.perf_counter()
    measured = []
    for role, model in case.models.items():
        logprob, correct = all_answers(model, case.forget, batch_size=case.batch_size)
        scores = fact_scores(case.forget, logprob, correct)
        own = {"probability": np.exp(scores.logprob), "truth_ratio": _truth_ratios(case.forget, logprob)}
        measured.append((role, PLAIN, own | scores.columns()))
    return StressResult(
        test="without_attack",
        level=0,
        measure="probability",
        frame=value_rows(case.forget, measured),
        proves=(
            "Above zero, the model still gives the answers more probability than one that never knew. None says "
            "nothing of what is inside."
        ),
        settings={"measures": ["probability", "truth_ratio", *MEASURES]},
        seconds=time.perf_counter() - started,
        floors={"probability": 0.0, "rank": RANK_FLOOR, "truth_ratio": 0.5},
        seed=case.seed,
    )


def _truth_ratios(facts: Facts, logprob: Float[np.ndarray, " item"]) -> Float[np.ndarray, " fact"]:
    answers = np.split(-logprob, right_places(facts)[1:])
    ratios = [log_truth_ratio(own[0], own[1:]) if len(own) > 1 else np.nan for own in answers]
    return knowledge_truth_ratio(np.array(ratios))
