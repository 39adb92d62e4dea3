"""`unlearn eval mia`: can the forget set be told from texts that nobody trained on?

One row a text of either set, with what each attack scores it (`unlearning.evaluation.metrics.membership`); every
attack's metrics are summed up from these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import sub

import numpy as np

from unlearning.common.errors import InputError, nearest
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
    "loss": "mean negative log-likelihood of the text's tokens, with those that close it",
    "zlib": "that loss for every byte of the compressed text",
    "lower": "that loss over the lower-cased text's",
    "min_k": "minus the mean log-probability of the least likely tokens",
    "min_k_plus_plus": "the same, each token's standardised by the distribution that it comes from",
    "reference": "that loss minus the reference model's",
    "grad_norm": "mean over parameter tensors of the norm of that loss's gradient",
}
"""What each scores a text."""

FREE = ("loss", "zlib", "lower", "min_k", "min_k_plus_plus")
"""Those that need the model alone, and at most two forward passes a text."""

SETS = ("forget", "holdout")
_FALSE_ALARMS = 0.01


def prepare(
    subject: Subject,
    *,
    forget: Sequence[Text],
    holdout: Sequence[Text],
    attacks: Sequence[str] | None = None,
    reference: Subject | None = None,
    fraction: float = FRACTION,
    max_tokens: int | None = None,
    chat: ChatFormat | None = None,
    limit: int | None = None,
    seed: int = 0,
    notes: tuple[str, ...] = (),
) -> Benchmark:
    """Make the attacks ready for a model.

    Args:
        subject: the model.
        forget: what it was to forget.
        holdout: texts of the same kind that it was never trained on.
        attacks: of `ATTACKS`; None for those that are free, and `reference` where there is a reference model.
        reference: a model that was not trained on the forget set and cuts texts into the same tokens.
        fraction: of the tokens that Min-K and Min-K++ read.
        max_tokens: score so many tokens of each text only; None for all. A text that is cut is not closed.
        chat: whose prompts these are, where they are some.
        limit: the first so many texts of each set only.
        seed: of the bootstrap draws.
        notes: what a reader should know.

    Raises:
        InputError: an unknown attack, a text without tokens to score or too long for the model, shared texts, or a
            reference model of another tokenizer.
    """
    chosen = chosen_attacks(attacks, has_reference=reference is not None)
    check_numbers(fraction=fraction, max_tokens=max_tokens, limit=limit)
    texts = dict(zip(SETS, (forget[:limit], holdout[:limit]), strict=True))
    notes += check_sets(texts["forget"], texts["holdout"])
    compared_with = reference if "reference" in chosen else None
    attacker = _Attacker(subject, chosen, compared_with, fraction, max_tokens, chat)
    return Benchmark(
        name="mia",
        configuration={
            **{f"{name}_sha256": hash_json([[text.prompt, text.answer] for text in texts[name]]) for name in SETS},
            "attacks": list(chosen),
            "fraction": fraction,
            "max_tokens": max_tokens,
            "reference_sha256": None if compared_with is None else compared_with.sha256,
        },
        parts=[attacker.part(name, texts[name]) for name in SETS],
        summarise=partial(_summarise, attacks=chosen, seed=seed),
        provenance={"reference": None if reference is None else reference.name},
        notes=notes,
    )


def chosen_attacks(attacks: Sequence[str] | None, *, has_reference: bool) -> tuple[str, ...]:
    """The attacks to run, in the order of `ATTACKS`.

    Raises:
        InputError: an unknown one, none, or `reference` without a reference model.
    """
    if attacks is None:
        return tuple(name for name in ATTACKS if name in FREE or (name == "reference" and has_reference))
    for name in attacks:
        if name not in ATTACKS:
            hint = nearest(name, ATTACKS) or ";"
            raise InputError(f"--attacks {name}: no such attack{hint} there are {', '.join(ATTACKS)}")
    if not attacks:
        raise InputError(f"--attacks names none; there are {', '.join(ATTACKS)}")
    if "reference" in attacks and not has_reference:
        raise InputError("--attacks reference needs a model to compare with; give --reference-model REF")
    return tuple(name for name in ATTACKS if name in attacks)


def check_numbers(*, fraction: float, max_tokens: int | None, limit: int | None) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        InputError: a number out of its range.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"--min-k {fraction}: a share of the tokens, above 0 and at most 1")
    for option, value in (("--max-tokens", max_tokens), ("--limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value}: 1 or more")


@dataclass(frozen=True)
class _Encoded:
    """A text as it is scored: possibly cut, tokenised, and the same in lower case where an attack asks for it."""

    text: Text
    scored: str
    target: Target
    lowered: Target | None

    @property
    def n_tokens(self) -> int:
        return len(self.target.span.input_ids)


@dataclass(frozen=True)
class _Attacker:
    """What scores texts, and how."""

    subject: Subject
    attacks: tuple[str, ...]
    reference: Subject | None
    fraction: float
    max_tokens: int | None
    chat: ChatFormat | None

    def part(self, name: str, texts: Sequence[Text]) -> Part:
        """One set of texts."""
        encoded = [self._encoded(text, f"{name} text {number}") for number, text in enumerate(texts, start=1)]
        return Part(name, [item.n_tokens for item in encoded], partial(self._rows, encoded))

    def _encoded(self, text: Text, where: str) -> _Encoded:
        is_whole = self.max_tokens is None
        scored = text.answer
        if self.max_tokens is not None:
            scored = first_tokens(self.subject.tokenizer, text.answer, self.max_tokens)
            is_whole = scored == text.answer
        encode = partial(encode_text, prompt=text.prompt, chat=self.chat, is_whole=is_whole, where=where)
        target = encode(self.subject, answer=scored)
        lowered = encode(self.subject, answer=scored.lower()) if "lower" in self.attacks else None
        if self.reference is not None and encode(self.reference, answer=scored) != target:
            raise InputError(
                f"--reference-model {self.reference.name}: its tokenizer cuts {scored[:40]!r} into other tokens, and "
                "losses a token cannot be compared; give a model of the same tokenizer"
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
        """What every attack scores the texts, and what two of them are made of."""
        targets = [item.target for item in items]
        wants_moments = "min_k_plus_plus" in self.attacks
        found = score_tokens(self.subject, targets, batch_size=len(targets), moments=wants_moments)
        plain = [scores.without_closing() for scores in found]
        loss = [scores.mean_nll for scores in found]
        columns = {
            "loss": loss,
            "zlib": [membership.zlib_score(mine, item.scored) for mine, item in zip(loss, items, strict=True)],
            "min_k": [membership.min_k(scores.log_probs, fraction=self.fraction) for scores in plain],
        }
        if wants_moments:
            columns["min_k_plus_plus"] = [membership.min_k_plus_plus(s, fraction=self.fraction) for s in plain]
        lowered = [item.lowered for item in items if item.lowered is not None]
        if lowered:
            other = _losses(self.subject, lowered)
            columns |= {"lower_loss": other, "lower": list(map(membership.loss_ratio, loss, other))}
        if self.reference is not None:
            other = _losses(self.reference, targets)
            columns |= {"reference_loss": other, "reference": list(map(sub, loss, other))}
        if "grad_norm" in self.attacks:
            columns["grad_norm"] = gradient_norms(self.subject, targets)
        return columns


def encode_text(
    subject: Subject, *, prompt: str, answer: str, chat: ChatFormat | None, is_whole: bool, where: str
) -> Target:
    """Tokenise a text; what closes it is there where its end is.

    Raises:
        InputError: it is empty, too long for the model's context, or a single token, which nothing predicts.
    """
    try:
        target = encode_target(subject, prompt, answer, chat=chat, append_eos=is_whole)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if n_predicted(target.span) <= target.n_closing:
        raise InputError(f"{where}: {answer!r} is a single token, which nothing predicts; remove it")
    return target


def _losses(subject: Subject, targets: Sequence[Target]) -> list[float]:
    return [scores.mean_nll for scores in score_tokens(subject, targets, batch_size=len(targets))]


def compared(rows: Rows, column: str, sets: Sequence[str], statistic: Callable[..., Values], *, seed: int) -> Resampled:
    """A statistic of the scores of two sets, each of which is resampled by itself.

    Args:
        rows: of a benchmark.
        column: the scores.
        sets: the forget set's and the hold-out set's name.
        statistic: of both sets' scores and weights, as `membership.auc`.
        seed: of the draws.
    """
    both = [rows[rows["set"] == name] for name in sets]
    scores = [frame[column].to_numpy(dtype=np.float64) for frame in both]
    samples = [Sample(name, frame["group"].tolist(), seed=seed) for name, frame in zip(sets, both, strict=True)]
    found = resample(partial(statistic, *scores), *samples)
    if min(sample.n for sample in samples) < 2:  # always the same draw
        return Resampled(found.value, np.full_like(found.draws, np.nan), found.n)
    return found


def _summarise(rows: Rows, retain_rows: Rows | None, *, attacks: Sequence[str], seed: int) -> list[Metric]:
    metrics: list[Metric] = []
    for attack in ATTACKS:
        if attack in attacks:
            area = compared(rows, attack, SETS, membership.auc, seed=seed)
            detection = partial(membership.detection_rate, false_alarms=_FALSE_ALARMS)
            rate = compared(rows, attack, SETS, detection, seed=seed)
            theirs = None if retain_rows is None else compared(retain_rows, attack, SETS, membership.auc, seed=seed)
            metrics += [_area(attack, area), _rate(attack, rate), *_relative(attack, area, theirs)]
        else:  # told once, by its main number
            metrics.append(_area(attack, None, _HOW_TO_GET.get(attack, "not among --attacks")))
    return metrics


_HOW_TO_GET = {
    "reference": "it compares with another model; give --reference-model REF",
    "grad_norm": "it takes a backward pass a text; ask for it by --attacks grad_norm",
}


def _area(attack: str, area: Resampled | None, reason: str | None = None) -> Metric:
    return Metric(
        f"{attack}_auc",
        area,
        "nearer to the retain model is better",
        f"P(hold-out text scores higher than forget text), each scored by the {ATTACKS[attack]}: 1 memorised, 0.5 not "
        "to be told apart, 0 over-forgotten",
        reason,
    )


def _rate(attack: str, rate: Resampled) -> Metric:
    return Metric(
        f"{attack}_tpr_at_1_fpr",
        rate,
        "nearer to the retain model is better",
        "share of the forget texts below a threshold that at most 1 % of the hold-out texts are below",
    )


def _relative(attack: str, area: Resampled, theirs: Resampled | None) -> list[Metric]:
    """What is relative to the retain model's AUC."""
    leakage, likeness = None, None
    reason = "it is relative to the retain model's AUC; give --retain-model N or --retain-result DIR"
    if theirs is not None:
        leakage = relative_leakage(area, theirs) if theirs.value < 1 else None
        likeness = combine(membership.retain_likeness, area, theirs) if theirs.value > 0 else None
        reason = f"the retain model's AUC is {theirs.value:.0f}, which leaves nothing to divide by"
    return [
        Metric(
            f"{attack}_privleak",
            leakage,
            "nearer to 0 is better",
            "100 (A - A_retain) / A_retain with A = 1 - AUC, as MUSE: -100 still memorised, above 0 over-unlearned",
            None if leakage is not None else reason,
        ),
        Metric(
            f"{attack}_s_score",
            likeness,
            "higher is better",
            "1 - |AUC - AUC_retain| / AUC_retain, at least 0: 1 is the retain model's",
            None if likeness is not None else reason,
        ),
    ]


def relative_leakage(area: Resampled, theirs: Resampled) -> Resampled:
    """PrivLeak from both models' AUC, in this module's direction."""
    return combine(lambda ours, other: membership.privacy_leakage(1 - ours, 1 - other), area, theirs)
