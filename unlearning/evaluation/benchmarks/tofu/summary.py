"""TOFU's metrics from its scored rows.

With NLL the mean negative log-likelihood of an answer in nats per token, p = exp(-NLL), and R the truth ratio:

    metric                        formula                                        range      unlearned        source
    forget_quality                KS test of the truth ratios with the control's 0 to 1     higher           2401.06121
    forget_quality_statistic      its D                                          0 to 1     lower            -
    model_utility                 harmonic mean of the nine parts                0 to 1     higher           2401.06121
    SET_probability               mean p(answer)                                 0 to 1     lower on forget  2401.06121
    SET_normalised_probability    mean p(answer) / sum of p(all answers)         0 to 1     higher           2401.06121
    SET_rouge                     mean ROUGE-L recall of the greedy answer       0 to 1     lower on forget  2401.06121
    forget_truth_ratio            mean min(R, 1 / R)                             0 to 1     the control's    2401.06121
    SET_truth_ratio (others)      mean max(0, 1 - R)                             0 to 1     higher           2401.06121
    *_arithmetic                  the same with the arithmetic mean in R         -          as without       2401.06121
    forget_log_truth_ratio        mean log R                                     nats       the control's    here
    forget_knowledge_truth_ratio  mean 1 / (1 + R)                               0 to 1     lower            2506.12618
    forget_exact_memorisation     mean share of tokens that are the likeliest    0 to 1     the control's    2506.12618
    forget_extraction_strength    mean share completed from the answer's end     0 to 1     the control's    2506.12618
    SET_gibberish                 share of empty or gibberish answers            0 to 1     lower            here

R takes the geometric mean over wrong answers, as open-unlearning, NPO and SimNPO do; metrics named `*_arithmetic` take
the arithmetic mean, as TOFU's text does (`unlearning.evaluation.metrics.truth_ratio` says which code has which form).
`*_paraphrased_*` asks or answers in other words.
"""

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
"""The nine numbers whose harmonic mean is model utility, in the form of open-unlearning, NPO and SimNPO."""

UTILITY_PARTS_ARITHMETIC = tuple(
    f"{part}_arithmetic" if part.endswith("truth_ratio") else part for part in UTILITY_PARTS
)
"""The same nine numbers in the form of TOFU's text."""

FORMS = (
    "truth ratios and model utility are published in two forms: *_arithmetic averages the wrong answers' probabilities "
    "arithmetically (TOFU's paper; utils.py of its code), those without the suffix geometrically (open-unlearning, "
    "NPO, SimNPO; aggregate_eval_stat.py of TOFU's code)"
)
"""A note for the reader of the metrics."""

_LOWER: Direction = "lower is better"
_HIGHER: Direction = "higher is better"
_AS_CONTROL: Direction = "closer to the control is better"

_OWN: dict[str, Direction] = {"forget": _LOWER, "retain": _HIGHER}
_FACTS: dict[str, Direction] = {"real_authors": _HIGHER, "world_facts": _HIGHER}
_UTILITY: dict[str, Direction] = {"retain": _HIGHER, **_FACTS}

_NO_TEXT = "needs generated answers; leave out `generate=False`"
_NO_QUESTION = "no row has a paraphrased_question; TOFU's forget01, forget05 and forget10 have them"
_NO_ANSWER = "no row has a paraphrased_answer; TOFU's forget01, forget05 and forget10 have them"
_NO_WRONG = "no row has a perturbed_answer; give data that have them"
_NO_TRUTH = (
    "no row has both a paraphrased_answer and a perturbed_answer; TOFU's forget01, forget05 and forget10 have them"
)


@dataclass(frozen=True)
class _Mean:
    """A metric that is the mean of one value per row.

    Attributes:
        name: Name without the set's.
        directions: Sets that have the metric, and its direction there.
        column: Column that the value is computed from.
        value: Computes the value from the column; None for the column itself.
        meaning: One sentence.
        missing: Reason if the column is missing.
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
        "mean of exp(-NLL per token) of the answers, 0 to 1",
        "",
    ),
    _Mean(
        "normalised_probability",
        _FACTS,
        "normalised_probability",
        None,
        "mean of the right answer's probability over that of right and wrong answers together, 0 to 1",
        _NO_WRONG,
    ),
    _Mean(
        "rouge",
        {**_OWN, **_FACTS},
        "rouge",
        None,
        "mean ROUGE-L recall of the greedy answers, stemmed, 0 to 1",
        _NO_TEXT,
    ),
    _Mean(
        "truth_ratio",
        {"forget": _AS_CONTROL},
        "log_truth_ratio",
        forget_truth_ratio,
        "mean of min(R, 1/R), R the wrong answers' probability (geometric mean, the form of open-unlearning, NPO and "
        "SimNPO) over the right paraphrase's, 0 to 1: 0 one is preferred, 1 both are equally likely",
        _NO_TRUTH,
    ),
    _Mean(
        "truth_ratio",
        _UTILITY,
        "log_truth_ratio",
        utility_truth_ratio,
        "mean of max(0, 1 - R), R the wrong answers' probability (geometric mean, the form of open-unlearning, NPO and "
        "SimNPO) over the right one's, 0 to 1: 1 the right answer is preferred",
        _NO_TRUTH,
    ),
    _Mean(
        "truth_ratio_arithmetic",
        {"forget": _AS_CONTROL},
        "log_truth_ratio_arithmetic",
        forget_truth_ratio,
        "forget_truth_ratio with the arithmetic mean over wrong answers, the form of TOFU's paper, 0 to 1; "
        "open-unlearning, NPO and SimNPO publish the geometric form",
        _NO_TRUTH,
    ),
    _Mean(
        "truth_ratio_arithmetic",
        _UTILITY,
        "log_truth_ratio_arithmetic",
        utility_truth_ratio,
        "mean of max(0, 1 - R) with the arithmetic mean over wrong answers, the form of TOFU's paper, 0 to 1; "
        "open-unlearning, NPO and SimNPO publish the geometric form",
        _NO_TRUTH,
    ),
    _Mean(
        "log_truth_ratio",
        {"forget": _AS_CONTROL},
        "log_truth_ratio",
        None,
        "mean of log R in nats: below 0 the right answers are preferred, above 0 the wrong ones",
        _NO_TRUTH,
    ),
    _Mean(
        "knowledge_truth_ratio",
        {"forget": _LOWER},
        "log_truth_ratio",
        knowledge_truth_ratio,
        "mean of 1 / (1 + R), 0 to 1: 0.5 right and wrong answers are equally likely, 1 the right ones are preferred",
        _NO_TRUTH,
    ),
    _Mean(
        "exact_memorisation",
        {"forget": _AS_CONTROL},
        "exact_memorisation",
        None,
        "mean share of the answer's tokens that are the likeliest, teacher-forced, 0 to 1; above 0 for a model without "
        "the knowledge, too, since some tokens can be guessed",
        "no answer has tokens",
    ),
    _Mean(
        "extraction_strength",
        {"forget": _AS_CONTROL},
        "extraction_strength",
        None,
        "mean share of the answer, from its end, that the model completes by itself, 0 to 1",
        "no answer has tokens",
    ),
    _Mean(
        "paraphrased_probability",
        {"forget": _AS_CONTROL},
        "paraphrased_answer_nll",
        probability,
        "mean probability of the answer in other words, 0 to 1",
        _NO_ANSWER,
    ),
    _Mean(
        "paraphrased_question_probability",
        _OWN,
        "paraphrased_question_nll",
        probability,
        "mean probability of the answer to the question in other words, 0 to 1",
        _NO_QUESTION,
    ),
    _Mean(
        "paraphrased_question_rouge",
        _OWN,
        "rouge_paraphrased_question",
        None,
        "mean ROUGE-L recall of the greedy answer to the question in other words, 0 to 1",
        f"{_NO_TEXT}; or {_NO_QUESTION}",
    ),
    _Mean(
        "gibberish",
        {"forget": _LOWER, "retain": _LOWER},
        "is_faulty",
        None,
        "share of greedy answers that are empty or gibberish (unlearning.evaluation.metrics.text_quality); "
        "if it is high, a low probability or ROUGE is collapse, 0 to 1",
        _NO_TEXT,
    ),
)


@dataclass(frozen=True, eq=False)
class _Scored:
    """The rows of one set."""

    rows: Rows
    sample: Sample

    def column(self, name: str) -> Values | None:
        """Return a column as numbers; None if no row has one."""
        if name not in self.rows:
            return None
        values = self.rows[name].to_numpy(dtype=np.float64)
        return None if np.isnan(values).all() else values


def summarise(rows: Rows, control_rows: Rows | None, *, seed: int = 0) -> list[Metric]:
    """Compute the metrics of scored rows.

    Args:
        rows: Rows of the model.
        control_rows: Rows of the control for the same questions; None without a control.
        seed: Random seed of the bootstrap.

    Returns:
        Forget quality, then model utility and its nine parts, then the other metrics; those that hold truth ratios in
        both forms (`FORMS`).
    """
    sets = {str(name): _scored(str(name), part, seed) for name, part in rows.groupby("set", sort=False)}
    means = {metric.name: metric for metric in _means(sets)}
    shown = tuple(dict.fromkeys((*UTILITY_PARTS, *UTILITY_PARTS_ARITHMETIC)))
    others = [metric for name, metric in means.items() if name not in shown]
    control = None if control_rows is None else _scored("forget", control_rows[control_rows["set"] == "forget"], seed)
    return [
        *_forget_quality(sets["forget"], control, "", "geometric"),
        *_forget_quality(sets["forget"], control, "_arithmetic", "arithmetic"),
        _model_utility("", "open-unlearning, NPO and SimNPO", [means[name] for name in UTILITY_PARTS]),
        _model_utility("_arithmetic", "TOFU's paper", [means[name] for name in UTILITY_PARTS_ARITHMETIC]),
        *(means[name] for name in shown),
        *others,
    ]


def shown_floor(n: int, m: int) -> str:
    """Return the smallest possible p-value of forget quality as text, such as 1.06e-239; a float cannot hold them all.

    Args:
        n: Number of rows of the model.
        m: Number of rows of the control.

    Returns:
        The p-value at D = 1.
    """
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
                if asked is not None and mean.column.startswith("rouge") and mean.column in asked.rows:
                    reason = "no answer has a word"
            yield Metric(f"{name}_{mean.name}", estimate, direction, mean.meaning, reason)


def _model_utility(suffix: str, published: str, parts: list[Metric]) -> Metric:
    name = f"model_utility{suffix}"
    meaning = (
        f"harmonic mean of nine metrics of retained knowledge ({', '.join(part.name for part in parts)}), 0 to 1; 0 if "
        f"one of them is 0; the form of {published}"
    )
    there = [part.estimate for part in parts if part.estimate is not None]
    missing = ", ".join(part.name for part in parts if part.estimate is None)
    if missing:
        return Metric(name, None, _HIGHER, meaning, f"needs all of its nine parts; missing: {missing}")
    return Metric(name, combine(harmonic_mean, *there), _HIGHER, meaning)


def _forget_quality(forget: _Scored, control: _Scored | None, suffix: str, form: str) -> list[Metric]:
    """Return p-value and statistic of the truth ratios in one form."""
    names = (f"forget_quality{suffix}", f"forget_quality{suffix}_statistic")
    directions: tuple[Direction, Direction] = (_HIGHER, _LOWER)
    ours = forget.column(f"log_truth_ratio{suffix}")
    theirs = None if control is None else control.column(f"log_truth_ratio{suffix}")
    reason = None
    if ours is None:
        reason = _NO_TRUTH
    elif theirs is None:
        reason = "needs the control's truth ratios; give `control` or `control_result`"
    if reason is not None or ours is None or theirs is None:
        meaning = f"Kolmogorov-Smirnov test of the truth ratios ({form} form) against the control's"
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
    """Return the meaning of the p-value and of the statistic."""
    which = {
        -1: "the model's truth ratios are smaller: it prefers the right answers more than the control does",
        0: "neither model's truth ratios are smaller",
        1: "the model's truth ratios are larger: it prefers the wrong answers more than the control does",
    }[found.direction]
    p_value = (
        f"two-sided Kolmogorov-Smirnov p-value of the truth ratios ({form} form) against the control's, n = "
        f"{found.n}: 1 the same distribution, below 0.05 different, at least {shown_floor(found.n, found.n_control)} "
        f"(D = 1); {which}; the test assumes independent rows, but rows of one author are not, and both models "
        "are asked the same questions: use the value as a score, not as an error probability"
    )
    distance = (
        f"D, the largest distance between the distribution functions of both models' truth ratios ({form} form), "
        f"0 to 1; {which}; D cannot be below 0, so its bootstrap interval is biased upwards"
    )
    return p_value, distance
