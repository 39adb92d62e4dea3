"""Scores without any attack: evidence level 0, and what every other test is compared with."""

import time

import numpy as np
from jaxtyping import Float

from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.result import PLAIN, StressResult, value_rows
from dissect.stress.core.scores import MEASURES, RANK_FLOOR, all_answers, fact_scores, right_indices
from dissect.stress.core.texts import TEXTS, answer_texts, text_rows
from unlearning.evaluation.metrics.truth_ratio import knowledge_truth_ratio, log_truth_ratio


def without_attack(case: Case) -> StressResult:
    """Score the answers' probability under each model as it is.

    Measures: `probability` decides: the geometric mean of the probabilities of an answer's tokens (TOFU's, in [0, 1]).
    `truth_ratio` is the knowledge truth ratio p(right) / (p(right) + p(wrong)) of 2506.12618, with p(wrong) the
    geometric mean over the distractors; 1/2 without knowledge. `rank`, `logprob`, `correct` and `accuracy` are those of
    `dissect.stress.core.scores`. Without a control, the residual of `probability` is the share of the base's
    probability.

    Args:
        case: Models and facts.

    Returns:
        The result of the test `without_attack`, with the table `texts` of the models' greedy answers
        (`dissect.stress.core.texts`).

    Raises:
        InputError: A model gives logits that are not finite.
    """
    started = time.perf_counter()
    measured, texts = [], []
    everything = range(len(case.forget))
    for role, model in case.models.items():
        logprob, correct = all_answers(model, case.forget, batch_size=case.batch_size)
        scores = fact_scores(case.forget, logprob, correct)
        own = {"probability": np.exp(scores.logprob), "truth_ratio": _truth_ratios(case.forget, logprob)}
        measured.append((role, PLAIN, own | scores.columns()))
        texts.append((role, PLAIN, everything, answer_texts(model, case.forget, batch_size=case.batch_size)))
    return StressResult(
        test="without_attack",
        level=0,
        measure="probability",
        frame=value_rows(case.forget, measured),
        proves=(
            "rho > 0: the model still gives the answers a higher probability than the control does. rho = 0 says "
            "nothing about what is stored inside the model."
        ),
        settings={"measures": ["probability", "truth_ratio", *MEASURES]},
        seconds=time.perf_counter() - started,
        floors={"probability": 0.0, "rank": RANK_FLOOR, "truth_ratio": 0.5},
        seed=case.seed,
        tables={TEXTS: text_rows(texts)},
    )


def _truth_ratios(facts: Facts, logprob: Float[np.ndarray, " item"]) -> Float[np.ndarray, " fact"]:
    """Return each fact's knowledge truth ratio; NaN if it has no distractors.

    Args:
        facts: The facts with their distractors.
        logprob: Mean log-probability of all answers, as `all_answers` orders them.
    """
    answers = np.split(-logprob, right_indices(facts)[1:])
    ratios = [log_truth_ratio(own[0], own[1:]) if len(own) > 1 else np.nan for own in answers]
    return knowledge_truth_ratio(np.array(ratios))
