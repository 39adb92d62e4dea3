"""`unlearn eval mia`: can the forget set be told apart from texts that no model was trained on?

One row per text of either set, with each attack's score (`unlearning.evaluation.metrics.membership`). Metrics of each
attack; `hold-out > forget` is the event that a hold-out text scores higher than a forget text:

    ATTACK_auc             P(hold-out > forget), ties half                 0 to 1       closer to the control's
    ATTACK_tpr_at_1_fpr    share of forget texts below the threshold that  0 to 1       closer to the control's
                           at most 1 % of the hold-out texts are below
    ATTACK_privleak        100 (A - A_control) / A_control, A = 1 - AUC    %, -100 up   closer to 0 (MUSE, 2407.06460)
    ATTACK_s_score         1 - |AUC - AUC_control| / AUC_control           0 to 1       higher
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import sub

import numpy as np

from unlearning.common.errors import InputError, check_at_least, nearest
from unlearning.common.hashing import hash_json
from unlearning.data.batches import n_predicted
from unlearning.data.chat import ChatFormat
from unlearning.evaluation.benchmarks.membership.texts import Text, check_sets
from unlearning.evaluation.harness import Benchmark, Part, Row, Rows
from unlearning.evaluation.metrics import membership
from unlearning.evaluation.metrics.gradient_norm import gradient_norms
from unlearning.evaluation.metrics.membership import FRACTION
from unlearning.evaluation.metrics.text_quality import first_tokens
from unlearning.evaluation.statistics import Metric, Resampled, Sample, Values, combine, resample
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, encode_target, score_tokens

ATTACKS = {
    "loss": "mean negative log-likelihood of the text's tokens, including those that close it",
    "zlib": "loss divided by the number of bytes of the compressed text",
    "lower": "loss divided by the loss of the lower-cased text",
    "min_k": "minus the mean log-probability of the least likely tokens",
    "min_k_plus_plus": "minus the mean standardised log-probability of the least likely tokens",
    "reference": "loss minus the reference model's loss",
    "grad_norm": "mean over parameter tensors of the norm of the loss's gradient",
}
"""Score of each attack."""

FREE = ("loss", "zlib", "lower", "min_k", "min_k_plus_plus")
"""Attacks that need no other model and at most two forward passes per text."""

SETS = ("forget", "holdout")
_FALSE_ALARMS = 0.01


@dataclass(frozen=True)
class Attacking:
    """Which attacks score a text, and how.

    Attributes:
        attacks: Names of `ATTACKS`; None for `FREE`, and `reference` if there is a reference model.
        reference: A model that was not trained on the forget set and has the same tokenizer.
        fraction: Share of the tokens that Min-K and Min-K++ read.
        max_tokens: Score only the first N tokens of each text; None for all. A text that is cut is not closed.
        chat: Chat format of the prompts, if they have one.
        append_eos: Score texts that are not cut with the end-of-sequence token.
    """

    attacks: Sequence[str] | None = None
    reference: Subject | None = None
    fraction: float = FRACTION
    max_tokens: int | None = None
    chat: ChatFormat | None = None
    append_eos: bool = True


def prepare(
    subject: Subject,
    *,
    forget: Sequence[Text],
    holdout: Sequence[Text],
    attacking: Attacking | None = None,
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> Benchmark:
    """Make the attacks ready for a model.

    Args:
        subject: The model.
        forget: Texts that the model was to forget.
        holdout: Texts of the same kind that no model was trained on.
        attacking: The attacks; None for those of `FREE`.
        seed: Random seed of the bootstrap.
        notes: Remarks for the reader.

    Returns:
        The benchmark, with the sets `forget` and `holdout`.

    Raises:
        InputError: An attack is unknown, a text has no tokens to score or is too long for the model, the sets share
            texts, or the reference model has another tokenizer.
    """
    attacking = attacking or Attacking()
    chosen = chosen_attacks(attacking.attacks, has_reference=attacking.reference is not None)
    check_numbers(fraction=attacking.fraction, max_tokens=attacking.max_tokens, limit=None)
    texts = dict(zip(SETS, (forget, holdout), strict=True))
    notes += check_sets(forget, holdout)
    reference = attacking.reference if "reference" in chosen else None
    attacker = _Attacker(subject, replace(attacking, attacks=chosen, reference=reference))
    return Benchmark(
        name="mia",
        configuration={
            **{f"{name}_sha256": hash_json([[text.prompt, text.answer] for text in texts[name]]) for name in SETS},
            "attacks": list(chosen),
            "fraction": attacking.fraction,
            "max_tokens": attacking.max_tokens,
            **({} if attacking.append_eos else {"append_eos": False}),  # runs of earlier versions always had it
            "reference_sha256": None if reference is None else reference.sha256,
        },
        parts=[attacker.part(name, texts[name]) for name in SETS],
        summarise=partial(_summarise, attacks=chosen, seed=seed),
        provenance={"reference": None if attacking.reference is None else attacking.reference.name},
        notes=notes,
    )


def chosen_attacks(attacks: Sequence[str] | None, *, has_reference: bool) -> tuple[str, ...]:
    """Return the attacks to run, in the order of `ATTACKS`.

    Args:
        attacks: Names of attacks; None for the default ones.
        has_reference: There is a reference model.

    Returns:
        Names of attacks, at least one.

    Raises:
        InputError: An attack is unknown, none is named, or `reference` is named without a reference model.
    """
    if attacks is None:
        return tuple(name for name in ATTACKS if name in FREE or (name == "reference" and has_reference))
    for name in attacks:
        if name not in ATTACKS:
            hint = nearest(name, ATTACKS) or ";"
            raise InputError(f"`attacks` must be among {', '.join(ATTACKS)}, got {name!r}{hint.rstrip(';')}")
    if not attacks:
        raise InputError(f"`attacks` must name at least one of {', '.join(ATTACKS)}, got none")
    if "reference" in attacks and not has_reference:
        raise InputError("the attack 'reference' needs a model to compare with. Give `reference_model`.")
    return tuple(name for name in ATTACKS if name in attacks)


def check_numbers(*, fraction: float, max_tokens: int | None, limit: int | None) -> None:
    """Check the numbers that can be checked before a model is loaded.

    Args:
        fraction: Share of the tokens that Min-K and Min-K++ read.
        max_tokens: Number of tokens scored per text, or None.
        limit: Number of texts per set, or None.

    Raises:
        InputError: A number is out of its range.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"`min_k` must be a share of the tokens, above 0 and at most 1, got {fraction}")
    for name, value in (("max_tokens", max_tokens), ("limit", limit)):
        if value is not None:
            check_at_least(name, value, 1)


@dataclass(frozen=True)
class _Encoded:
    """A text as it is scored: possibly cut, tokenised, and lower-cased if an attack asks for it."""

    text: Text
    scored: str
    target: Target
    lowered: Target | None

    @property
    def n_tokens(self) -> int:
        """Number of tokens, including the prompt's."""
        return len(self.target.span.input_ids)


@dataclass(frozen=True)
class _Attacker:
    """Scores texts by the attacks of `attacking`, all of which are named."""

    subject: Subject
    attacking: Attacking

    def has(self, attack: str) -> bool:
        """Return whether an attack was asked for."""
        return attack in (self.attacking.attacks or ())

    def part(self, name: str, texts: Sequence[Text]) -> Part:
        """Return one set of texts, ready to be scored."""
        encoded = [self._encoded(text, f"{name} text {number}") for number, text in enumerate(texts, start=1)]
        return Part(name, [item.n_tokens for item in encoded], partial(self._rows, encoded))

    def _encoded(self, text: Text, where: str) -> _Encoded:
        max_tokens, reference = self.attacking.max_tokens, self.attacking.reference
        scored = text.answer
        if max_tokens is not None:
            scored = first_tokens(self.subject.tokenizer, text.answer, max_tokens)
        closes = self.attacking.append_eos and scored == text.answer
        encode = partial(encode_text, prompt=text.prompt, chat=self.attacking.chat, closes=closes, where=where)
        target = encode(self.subject, answer=scored)
        lowered = encode(self.subject, answer=scored.lower()) if self.has("lower") else None
        if reference is not None and encode(reference, answer=scored) != target:
            raise InputError(
                f"`reference_model` must have the model's tokenizer, got {reference.name}, which cuts {scored[:40]!r} "
                "into other tokens"
            )
        return _Encoded(text, scored, target, lowered)

    def _rows(self, encoded: Sequence[_Encoded], places: Sequence[int]) -> list[Row]:
        items = [encoded[place] for place in places]
        columns = self._columns(items)
        return [
            {"id": item.text.id, "group": item.text.group, "n_tokens": item.n_tokens}
            | {name: values[row] for name, values in columns.items()}
            for row, item in enumerate(items)
        ]

    def _columns(self, items: Sequence[_Encoded]) -> dict[str, list[float]]:
        """Return the score of every attack for each text, and the losses that two attacks are computed from."""
        targets = [item.target for item in items]
        wants_moments, reference = self.has("min_k_plus_plus"), self.attacking.reference
        fraction = self.attacking.fraction
        found = score_tokens(self.subject, targets, batch_size=len(targets), moments=wants_moments)
        plain = [scores.without_closing() for scores in found]
        loss = [scores.mean_nll for scores in found]
        columns = {
            "loss": loss,
            "zlib": [membership.zlib_score(mine, item.scored) for mine, item in zip(loss, items, strict=True)],
            "min_k": [membership.min_k(scores.log_probs, fraction=fraction) for scores in plain],
        }
        if wants_moments:
            columns["min_k_plus_plus"] = [membership.min_k_plus_plus(s, fraction=fraction) for s in plain]
        lowered = [item.lowered for item in items if item.lowered is not None]
        if lowered:
            other = _losses(self.subject, lowered)
            columns |= {"lower_loss": other, "lower": list(map(membership.loss_ratio, loss, other))}
        if reference is not None:
            other = _losses(reference, targets)
            columns |= {"reference_loss": other, "reference": list(map(sub, loss, other))}
        if self.has("grad_norm"):
            columns["grad_norm"] = gradient_norms(self.subject, targets)
        return columns


def encode_text(
    subject: Subject, *, prompt: str, answer: str, chat: ChatFormat | None, closes: bool, where: str
) -> Target:
    """Tokenise a text.

    Args:
        subject: The model, with its tokenizer.
        prompt: Text before the scored one; may be empty.
        answer: Text that is scored.
        chat: Chat format of the prompt, if it has one.
        closes: Close the text by the tokens that end a sequence; for a text that was not cut.
        where: Set and number of the text, for messages.

    Returns:
        The tokens, and which of them are scored.

    Raises:
        InputError: The text is empty, too long for the model's context, or a single token, which nothing predicts.
    """
    try:
        target = encode_target(subject, prompt, answer, chat=chat, append_eos=closes)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if n_predicted(target.span) <= target.n_closing:
        raise InputError(f"{where}: the text must have at least two tokens, got {answer!r}. Remove it.")
    return target


def _losses(subject: Subject, targets: Sequence[Target]) -> list[float]:
    return [scores.mean_nll for scores in score_tokens(subject, targets, batch_size=len(targets))]


def compared(rows: Rows, column: str, sets: Sequence[str], statistic: Callable[..., Values], *, seed: int) -> Resampled:
    """Compute a statistic of the scores of two sets, each of which is resampled by itself.

    Args:
        rows: Rows of a benchmark.
        column: Name of the column that holds the scores.
        sets: Names of the forget set and of the hold-out set.
        statistic: Function of both sets' scores and weights, such as `membership.auc`.
        seed: Random seed of the draws.

    Returns:
        The statistic; its draws are NaN if a set has fewer than two texts or groups.
    """
    both = [rows[rows["set"] == name] for name in sets]
    scores = [frame[column].to_numpy(dtype=np.float64) for frame in both]
    samples = [Sample(name, frame["group"].tolist(), seed=seed) for name, frame in zip(sets, both, strict=True)]
    found = resample(partial(statistic, *scores), *samples)
    if min(sample.n for sample in samples) < 2:  # always the same draw
        return Resampled(found.value, np.full_like(found.draws, np.nan), found.n)
    return found


def _summarise(rows: Rows, control_rows: Rows | None, *, attacks: Sequence[str], seed: int) -> list[Metric]:
    metrics: list[Metric] = []
    for attack in ATTACKS:
        if attack in attacks:
            area = compared(rows, attack, SETS, membership.auc, seed=seed)
            detection = partial(membership.detection_rate, false_alarms=_FALSE_ALARMS)
            rate = compared(rows, attack, SETS, detection, seed=seed)
            theirs = None if control_rows is None else compared(control_rows, attack, SETS, membership.auc, seed=seed)
            metrics += [_area(attack, area), _rate(attack, rate), *_relative(attack, area, theirs)]
        else:  # one metric stands for the attack that was left out
            metrics.append(_area(attack, None, _HOW_TO_GET.get(attack, "not among `attacks`")))
    return metrics


_HOW_TO_GET = {
    "reference": "it compares with another model; give `reference_model`",
    "grad_norm": "it takes one backward pass per text; add grad_norm to `attacks`",
}


def _area(attack: str, area: Resampled | None, reason: str | None = None) -> Metric:
    return Metric(
        f"{attack}_auc",
        area,
        "closer to the control is better",
        f"P(hold-out text scores higher than forget text), scored by the {ATTACKS[attack]}: 1 memorised, 0.5 "
        "indistinguishable, 0 over-forgotten",
        reason,
    )


def _rate(attack: str, rate: Resampled) -> Metric:
    return Metric(
        f"{attack}_tpr_at_1_fpr",
        rate,
        "closer to the control is better",
        "share of the forget texts below the threshold that at most 1 % of the hold-out texts are below, 0 to 1",
    )


def _relative(attack: str, area: Resampled, theirs: Resampled | None) -> list[Metric]:
    """Return the metrics that are relative to the control's AUC."""
    leakage, likeness = None, None
    reason = "it is relative to the control's AUC; give `control` or `control_result`"
    if theirs is not None:
        leakage = relative_leakage(area, theirs) if theirs.value < 1 else None
        likeness = combine(membership.control_likeness, area, theirs) if theirs.value > 0 else None
        reason = f"the control's AUC is {theirs.value:.0f}, and the metric divides by 0"
    return [
        Metric(
            f"{attack}_privleak",
            leakage,
            "closer to 0 is better",
            "100 (A - A_control) / A_control in percent, A = 1 - AUC, as in MUSE: -100 still memorised, above 0 "
            "over-unlearned",
            None if leakage is not None else reason,
        ),
        Metric(
            f"{attack}_s_score",
            likeness,
            "higher is better",
            "1 - |AUC - AUC_control| / AUC_control, 0 to 1: 1 if the AUC is the control's",
            None if likeness is not None else reason,
        ),
    ]


def relative_leakage(area: Resampled, theirs: Resampled) -> Resampled:
    """Return PrivLeak from the AUC of model and control, both in this module's direction (1: memorised)."""
    return combine(lambda ours, other: membership.privacy_leakage(1 - ours, 1 - other), area, theirs)
