"""From TOFU's scored rows to its metrics."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from unlearning.evaluation.harness import Rows
from unlearning.evaluation.metrics.forget_quality import Comparison, compare, log10_floor, statistic
from unlearning.evaluation.metrics.model_utility import harmonic_mean
from unlearning.evaluation.metrics.probability import probability
from unlearning.evaluation.metrics.truth_ratio import forget_truth_ratio, knowledge_truth_ratio, utility_truth_ratio
from unlearning.evaluation.statistics import Direction, Metric, Sample, combine, fixed, resample

Values = Float[np.ndarray, " row"]

UTILITY_PARTS = (
    *("retain_probability", "retain_rouge", "retain_truth_ratio"),
    *("real_authors_normalised_probability", "real_authors_rouge", "real_authors_truth_ratio"),
    *("world_facts_normalised_probability", "world_facts_rouge", "world_facts_truth_ratio"),
)
"""What model utility is the harmonic mean of."""

_LOWER: Direction = "lower is better"
_HIGHER: Direction = "higher is better"
_AS_RETAIN: Direction = "nearer to the retain model is better"

_OWN: dict[str, Direction] = {"forget": _LOWER, "retain": _HIGHER}
_FACTS: dict[str, Direction] = {"real_authors": _HIGHER, "world_facts": _HIGHER}
_UTILITY: dict[str, Direction] = {"retain": _HIGHER, **_FACTS}

_NO_TEXT = "needs generated answers; leave out --no-generate"
_NO_QUESTION = "no row has a paraphrased_question; TOFU's forget01, forget05 and forget10 have them"
_NO_ANSWER = "no row has a paraphrased_answer; TOFU's forget01, forget05 and forget10 have them"
_NO_WRONG = "no row has a perturbed_answer; give data that have them"
_NO_TRUTH = (
    "no row has both a paraphrased_answer and a perturbed_answer; TOFU's forget01, forget05 and forget10 have them"
)


@dataclass(frozen=True)
class _Mean:
    """A metric that is the mean of one value a row.

    Attributes:
        name: without the set's.
        directions: the sets that have it, and what is good there.
        column: what the value is made of.
        value: makes it.
        meaning: one sentence.
        missing: why there is none where the column is missing.
    """

    name: str
    directions: Mapping[str, Direction]
    column: str
    value: Callable[[Values], Values] | None
    meaning: str
    missing: str


_MEANS = (
    _Mean(
        "probability",
        {**_OWN, **_FACTS},
        "answer_nll",
        probability,
        "mean of the answers' probabilities, each to the power of one over its tokens; 0 to 1",
        "",
    ),
    _Mean(
        "normalised_probability",
        _FACTS,
        "normalised_probability",
        None,
        "mean share of the right answer's probability in that of right and wrong answers together; 0 to 1",
        _NO_WRONG,
    ),
    _Mean(
        "rouge",
        {**_OWN, **_FACTS},
        "rouge",
        None,
        "mean ROUGE-L recall of the greedy answers, stemmed; 0 to 1",
        _NO_TEXT,
    ),
    _Mean(
        "truth_ratio",
        {"forget": _AS_RETAIN},
        "log_truth_ratio",
        forget_truth_ratio,
        "mean of min(R, 1/R), R the wrong answers' probability (geometric mean) by the right paraphrase's; 0: one is "
        "preferred, 1: both alike",
        _NO_TRUTH,
    ),
    _Mean(
        "truth_ratio",
        _UTILITY,
        "log_truth_ratio",
        utility_truth_ratio,
        "mean of max(0, 1 - R), R the wrong answers' probability (geometric mean) by the right one's; 0 to 1: the "
        "right answer is preferred",
        _NO_TRUTH,
    ),
    _Mean(
        "truth_ratio_arithmetic",
        {"forget": _AS_RETAIN},
        "log_truth_ratio_arithmetic",
        forget_truth_ratio,
        "the same with the wrong answers' arithmetic mean, as in the paper's text; not what published tables hold",
        _NO_TRUTH,
    ),
    _Mean(
        "log_truth_ratio",
        {"forget": _AS_RETAIN},
        "log_truth_ratio",
        None,
        "mean of log R; below 0 the right answers are preferred, above 0 the wrong ones",
        _NO_TRUTH,
    ),
    _Mean(
        "knowledge_truth_ratio",
        {"forget": _LOWER},
        "log_truth_ratio",
        knowledge_truth_ratio,
        "mean of 1 / (1 + R); 0.5: right and wrong answers alike, 1: the right ones are preferred",
        _NO_TRUTH,
    ),
    _Mean(
        "exact_memorisation",
        {"forget": _AS_RETAIN},
        "exact_memorisation",
        None,
        "mean share of the answer's tokens that are the likeliest, teacher-forced; not 0 for a model that knows "
        "nothing of it, as some tokens can be guessed",
        "no answer has tokens",
    ),
    _Mean(
        "extraction_strength",
        {"forget": _AS_RETAIN},
        "extraction_strength",
        None,
        "mean share of the answer, from its end, that the model completes by itself; 0 to 1",
        "no answer has tokens",
    ),
    _Mean(
        "paraphrased_probability",
        {"forget": _AS_RETAIN},
        "paraphrased_answer_nll",
        probability,
        "probability of the answer in other words; 0 to 1",
        _NO_ANSWER,
    ),
    _Mean(
        "paraphrased_question_probability",
        _OWN,
        "paraphrased_question_nll",
        probability,
        "probability of the answer to the question in other words; 0 to 1",
        _NO_QUESTION,
    ),
    _Mean(
        "paraphrased_question_rouge",
        _OWN,
        "rouge_paraphrased_question",
        None,
        "ROUGE-L recall of the greedy answer to the question in other words; 0 to 1",
        f"{_NO_TEXT}; or {_NO_QUESTION}",
    ),
    _Mean(
        "gibberish",
        {"forget": _LOWER, "retain": _LOWER},
        "is_faulty",
        None,
        "share of greedy answers that are empty or gibberish (unlearning.evaluation.metrics.text_quality); "
        "where it is high, a low probability or ROUGE is collapse",
        _NO_TEXT,
    ),
)


@dataclass(frozen=True, eq=False)
class _Scored:
    """The rows of one set."""

    rows: Rows
    sample: Sample

    def column(self, name: str) -> Values | None:
        """As numbers; None where no row has one."""
        if name not in self.rows:
            return None
        values = self.rows[name].to_numpy(dtype=np.float64)
        return None if np.isnan(values).all() else values


def summarise(rows: Rows, retain_rows: Rows | None, *, seed: int = 0) -> list[Metric]:
    """The metrics of scored rows; forget quality first, then model utility with its nine parts, then the others.

    Args:
        rows: of the model.
        retain_rows: of the retain model, to the same questions.
        seed: of the bootstrap draws.
    """
    sets = {str(name): _scored(str(name), part, seed) for name, part in rows.groupby("set", sort=False)}
    means = {metric.name: metric for metric in _means(sets)}
    parts = [means.pop(name) for name in UTILITY_PARTS]
    retain = None if retain_rows is None else _scored("forget", retain_rows[retain_rows["set"] == "forget"], seed)
    return [
        *_forget_quality(sets["forget"], retain, "", "geometric"),
        *_forget_quality(sets["forget"], retain, "_arithmetic", "arithmetic"),
        _model_utility(parts),
        *parts,
        *means.values(),
    ]


def shown_floor(n: int, m: int) -> str:
    """The smallest p-value of forget quality, as 1.06e-239; a float has no place for those of large sets."""
    exponent = int(np.floor(log10_floor(n, m)))
    return f"{10 ** (log10_floor(n, m) - exponent):.2f}e{exponent}"


def _scored(name: str, rows: Rows, seed: int) -> _Scored:
    ordered = rows.sort_values("row")
    return _Scored(ordered, Sample(name, [str(group) for group in ordered["group"]], seed=seed))


def _means(sets: Mapping[str, _Scored]) -> Iterator[Metric]:
    for mean in _MEANS:
        for name, direction in mean.directions.items():
            asked = sets.get(name)
            values = None if asked is None else asked.column(mean.column)
            if values is not None and mean.value is not None:
                values = mean.value(values)
            estimate = None if asked is None or values is None else asked.sample.mean(values)
            reason = None
            if estimate is None:
                reason = f"the {name} questions were not asked" if asked is None else mean.missing
            yield Metric(f"{name}_{mean.name}", estimate, direction, mean.meaning, reason)


def _model_utility(parts: list[Metric]) -> Metric:
    meaning = "harmonic mean of nine numbers about what was to be kept (the next nine); 0 where one of them is"
    there = [part.estimate for part in parts if part.estimate is not None]
    missing = ", ".join(part.name for part in parts if part.estimate is None)
    if missing:
        return Metric("model_utility", None, _HIGHER, meaning, f"needs all of its nine parts, and lacks {missing}")
    return Metric("model_utility", combine(harmonic_mean, *there), _HIGHER, meaning)


def _forget_quality(forget: _Scored, retain: _Scored | None, suffix: str, form: str) -> list[Metric]:
    """p-value and statistic of the truth ratios in one form."""
    names = (f"forget_quality{suffix}", f"forget_quality{suffix}_statistic")
    directions: tuple[Direction, Direction] = (_HIGHER, _LOWER)
    ours = forget.column(f"log_truth_ratio{suffix}")
    theirs = None if retain is None else retain.column(f"log_truth_ratio{suffix}")
    reason = None
    if ours is None:
        reason = _NO_TRUTH
    elif theirs is None:
        reason = "needs the retain model's truth ratios; give --retain-model or --retain-result"
    if reason is not None or ours is None or theirs is None:
        meaning = f"Kolmogorov-Smirnov test of the truth ratios ({form} form) against the retain model's"
        pairs = zip(names, directions, strict=True)
        return [Metric(name, None, direction, meaning, reason) for name, direction in pairs]
    found = compare(ours, theirs)
    p_value = fixed(found.p_value, found.n)
    distance = resample(lambda weights: statistic(weights, weights, ours, theirs), forget.sample)
    described = _described(found, form)
    return [
        Metric(names[0], p_value, directions[0], described[0], has_interval=False),
        Metric(names[1], distance, directions[1], described[1]),
    ]


def _described(found: Comparison, form: str) -> tuple[str, str]:
    """What p-value and statistic mean."""
    which = {
        -1: "the model's are the smaller ones: it prefers the right answers more than the retain model does",
        0: "neither model's are the smaller ones",
        1: "the model's are the larger ones: it prefers the wrong answers more than the retain model does",
    }[found.direction]
    p_value = (
        f"two-sided Kolmogorov-Smirnov p-value of the truth ratios ({form} form) against the retain model's, n = "
        f"{found.n}: 1 is the same, below 0.05 is told apart, and none is below {shown_floor(found.n, found.n_retain)} "
        f"(D = 1); {which}; the test takes all rows for independent, while an author's are alike and both models are "
        "asked the same: a score, not the probability of an error"
    )
    distance = (
        f"D, the largest distance between the distributions of both models' truth ratios ({form} form), 0 to 1; "
        f"{which}; no draw is below 0, so its interval leans upwards"
    )
    return p_value, distance
