"""Linear probes: is the answer a linear function of the state that predicts it, learned on other people's facts?

Where answers are open, hardly any comes twice, and a classifier has nothing to learn. The probe is then a ridge
regression from the state at the question's last position to the answer's embedding, and an answer is scored by the
cosine between its embedding and the predicted one. It is fitted on the facts of T (retain facts, and forget facts of
other groups) and asked about V. Where answers come from few classes a multinomial logistic regression stands beside it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt, Prompts
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.residual_stream import states_at
from dissect.stress.core.result import StressResult, value_rows
from dissect.stress.core.scores import ranks
from unlearning.common.errors import InputError

ALPHAS = (1.0, 10.0, 100.0, 1000.0)
"""Strengths of the ridge that cross-validation chooses from; features have unit variance."""

INNER_FOLDS = 3
MAX_CLASSES = 16
"""Answers that are few enough for a classifier; on average each has to come `MIN_PER_CLASS` times."""
MIN_PER_CLASS = 5

EMBEDDING = "embeddings"
"""The control that reads what enters the first block."""


def linear_probes(case: Case, *, layers: Sequence[int] | None = None, folds: int = 5) -> StressResult:
    """Whether a linear probe reads answers of people that it was not fitted on (section 5 of the protocols).

    Variants are `own probe, layer 3`, fitted on each model's own states; `base's probe, layer 3`, fitted on the base's
    and applied to all; and, where answers are few, `classifier, layer 3`. The last layer, which is the output, is not
    probed. Measures: `rank` decides; `selectivity` is `rank` less that of a probe fitted to shuffled answers.

    Args:
        case: models and facts.
        layers: which blocks' outputs are read; by default eight at most, evenly spaced over all but the last.
        folds: of the groups of the forget facts; each is asked by a probe that was fitted without it.

    Raises:
        InputError: too few groups to split, or a layer that there is not.
    """
    started = time.perf_counter()
    base = case.pair.base
    chosen = _checked(layers, base)
    split = Split.of(case, folds)
    embeddings = Answers.of(base, case.forget, split.prompts)
    shuffled = np.random.default_rng(case.seed).permutation(len(split.prompts))
    rows: list[tuple[str, str, dict[str, Float[np.ndarray, " fact"]]]] = []
    means: list[dict[str, object]] = []
    questions = _questions(split.prompts)
    states = {
        role: states_at(model, split.prompts, questions, batch_size=case.batch_size)
        for role, model in case.models.items()
    }
    for place in [0, *(layer + 1 for layer in chosen)]:
        where = f"layer {place - 1}" if place else EMBEDDING
        here = {role: of_role[place].to(base.device) for role, of_role in states.items()}
        of_base = dict(
            zip(here, probe_ranks(here["base"], list(here.values()), embeddings, split, shuffled), strict=True)
        )
        for role, of_role in here.items():
            own = of_base[role]
            if role != "base":
                (own,) = probe_ranks(of_role, [of_role], embeddings, split, shuffled)
            for name, found in (("own probe", own), ("base's probe", of_base[role])):
                rank, control = found
                means.append(
                    {"role": role, "probe": f"{name}, {where}", "rank": _mean(rank), "shuffled": _mean(control)}
                )
                if place:
                    rows.append((role, f"{name}, {where}", {"rank": rank, "selectivity": rank - control}))
            if place and split.is_classification:
                rows.append(
                    (role, f"classifier, {where}", {"rank": class_ranks(of_role.cpu().numpy(), case.forget, split)})
                )
    return StressResult(
        test="linear_probes",
        level=1,
        measure="rank",
        frame=value_rows(case.forget, rows),
        proves=(
            "Above zero, a linear map learned on other groups' facts finds these answers in the states before the last "
            "layer: they are decodable. It does not show that the model uses them; none shows only that no "
            "linear map at this position finds them."
        ),
        settings={"layers": chosen, "folds": folds, "alphas": list(ALPHAS), "position": "last of the question"},
        seconds=time.perf_counter() - started,
        floors={},  # of many probes the best, and what a question's kind tells of its answer, only such a model tells
        notes=() if split.is_classification else ("answers are too many for a classifier: regression alone",),
        seed=case.seed,
        tables={"probes": pd.DataFrame(means)},
    )


@dataclass(frozen=True, eq=False)
class Split:
    """Forget facts, then retain facts, and which of them a probe is fitted on and asked about.

    Attributes:
        prompts: all of them.
        groups: a number for each one's group.
        folds: for each fold, the places of T and of V.
        is_classification: whether answers are few.
    """

    prompts: Prompts
    groups: Int[np.ndarray, " fact"]
    folds: tuple[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]], ...]
    is_classification: bool

    @classmethod
    def of(cls, case: Case, n_folds: int) -> "Split":
        """Split the groups of the forget facts into folds; retain facts of none of their groups are in every T.

        Raises:
            InputError: fewer groups than folds.
        """
        forget = case.forget.prompts.items
        names = {item.group for item in forget} - {""}
        others = () if case.retain is None else case.retain.prompts.items
        items = (*forget, *(item for item in others if item.group not in names))
        keys = [item.group or f"fact {place}" for place, item in enumerate(items)]
        groups = np.unique(keys, return_inverse=True)[1]
        n_groups = len(set(groups[: len(forget)]))
        if not 2 <= n_folds <= n_groups or len(set(groups)) - -(-n_groups // n_folds) < INNER_FOLDS:
            raise InputError(
                f"linear probes are fitted on other groups than they are asked about, and {n_groups} groups of forget "
                f"facts cannot be split into {n_folds} folds; give more groups"
            )
        rest = np.arange(len(forget), len(items))
        parts = GroupKFold(n_folds).split(np.zeros(len(forget)), groups=groups[: len(forget)])
        folds = tuple((np.concatenate([train, rest]), test) for train, test in parts)
        answers = [item.answer for item in items]
        few = len(set(answers)) <= min(MAX_CLASSES, len(answers) // MIN_PER_CLASS)
        return cls(replace(case.forget.prompts, items=items), groups, folds, few)


@dataclass(frozen=True, eq=False)
class Answers:
    """Embeddings of answers: of the first token, and the mean over all, of the base's unembedding.

    Attributes:
        right: of every fact, forget and retain.
        wrong: of the wrong answers to the forget facts, fact by fact.
        counts: how many of those each forget fact has.
    """

    right: Float[Tensor, "fact two_d_model"]
    wrong: Float[Tensor, "wrong two_d_model"]
    counts: list[int]

    @classmethod
    def of(cls, base: Model, forget: Facts, prompts: Prompts) -> "Answers":
        table = base.hf.get_output_embeddings().weight.detach()

        def embedded(items: Sequence[Prompt]) -> Float[Tensor, "item two_d_model"]:
            rows = []
            for item in items:
                tokens = table[list(item.input_ids[item.answer_start :])].float()
                rows.append(torch.cat([tokens[0], tokens.mean(0)]))
            return torch.stack(rows).to(base.device) if rows else torch.zeros(0, 2 * table.shape[1], device=base.device)

        wrong = [item for several in forget.distractors for item in several]
        return cls(embedded(prompts.items), embedded(wrong), [len(several) for several in forget.distractors])


def _questions(prompts: Prompts) -> list[Prompt]:
    """The questions alone, read at their last position, which predicts the answer's first token."""
    return [
        replace(
            item, input_ids=item.input_ids[: item.answer_start], scored=range(item.answer_start - 1, item.answer_start)
        )
        for item in prompts.items
    ]


@torch.inference_mode()
def probe_ranks(
    train: Float[Tensor, "fact d_model"],
    asked: Sequence[Float[Tensor, "fact d_model"]],
    answers: Answers,
    split: Split,
    shuffled: Int[np.ndarray, " fact"],
) -> list[Float[np.ndarray, "two forget"]]:
    """Ranks of the forget facts' answers by the ridge probe, and by the same one fitted to shuffled answers.

    Args:
        train: the states that it is fitted on.
        asked: the states that it is asked about, of the same facts, for one model or several.
        answers: what the states are mapped to.
        split: who is in T and who in V.
        shuffled: an order of the facts, by which answers of T are dealt out anew for the control.
    """
    width = answers.right.shape[1]
    fact = np.repeat(np.arange(len(answers.counts)), answers.counts)
    found = [np.full((2, len(answers.counts)), np.nan) for _ in asked]
    for places, test in split.folds:
        inside = places[np.argsort(shuffled[places])]
        mean, spread = train[places].mean(0), train[places].std(0, correction=0)
        # What is constant, as the embedding of a last token that all questions share, says nothing.
        scale = torch.where(spread > 1e-6 * spread.max().clamp(min=1e-6), spread, torch.inf)
        features = (train[places] - mean) / scale
        centre = answers.right[places].mean(0)
        targets = torch.cat([answers.right[places] - centre, answers.right[inside] - centre], dim=1)
        alpha = best_alpha(features, targets[:, :width], split.groups[places])
        (weights,) = ridge(features, targets, [alpha])
        here = np.isin(fact, test)
        candidates, counts = answers.wrong[here] - centre, [answers.counts[place] for place in test]
        for of_model, states in zip(found, asked, strict=True):
            predicted = ((states[test] - mean) / scale) @ weights
            for row, guess in enumerate(predicted.split(width, dim=1)):
                right = torch.cosine_similarity(guess, answers.right[test] - centre)
                wrong = torch.cosine_similarity(guess[np.searchsorted(test, fact[here])], candidates)
                of_model[row, test] = ranks(right.cpu().numpy(), wrong.cpu().numpy(), counts)
    return found


def ridge(
    features: Float[Tensor, "fact d_in"], targets: Float[Tensor, "fact d_out"], alphas: Sequence[float]
) -> list[Float[Tensor, "d_in d_out"]]:
    """Ridge regression without intercept, W = (X'X + alpha)^-1 X'Y, for several alphas from one decomposition.

    scikit-learn's, on whatever device the states are: it is fitted hundreds of times on targets as wide as the model.
    """
    u, s, vh = torch.linalg.svd(features.double(), full_matrices=False)
    projected = u.mT @ targets.double()
    return [(vh.mT @ (projected * (s / (s.square() + alpha))[:, None])).to(features.dtype) for alpha in alphas]


def best_alpha(
    features: Float[Tensor, "fact d_in"], targets: Float[Tensor, "fact d_out"], groups: Int[np.ndarray, " fact"]
) -> float:
    """The strength with the least squared error on groups that were left out; see `ALPHAS`."""
    errors = torch.zeros(len(ALPHAS), dtype=torch.float64)
    for fitted, left in GroupKFold(INNER_FOLDS).split(np.zeros(len(groups)), groups=groups):
        for place, weights in enumerate(ridge(features[fitted], targets[fitted], ALPHAS)):
            errors[place] += float((features[left] @ weights - targets[left]).square().sum())
    return ALPHAS[int(errors.argmin())]


def class_ranks(states: Float[np.ndarray, "fact d_model"], forget: Facts, split: Split) -> Float[np.ndarray, " forget"]:
    """Ranks of the forget facts' answers by a multinomial logistic regression; NaN for an answer that T does not have.

    Args:
        states: of the facts of `split`.
        forget: the first of them, with their wrong answers; those that T does not have are left out.
        split: who is in T and who in V.
    """
    answers = np.array([item.answer for item in split.prompts.items])
    found = np.full(len(forget), np.nan)
    for places, test in split.folds:
        if len(set(answers[places])) < 2:
            continue
        probe = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
            {"logisticregression__C": [0.01, 0.1, 1.0]},
            cv=GroupKFold(INNER_FOLDS),
        ).fit(states[places], answers[places], groups=split.groups[places])
        column = {str(name): place for place, name in enumerate(probe.classes_)}
        scores = probe.predict_log_proba(states[test])
        for row, place in enumerate(test):
            right = column.get(answers[place])
            wrong = [column[item.answer] for item in forget.distractors[place] if item.answer in column]
            if right is not None and wrong:
                found[place] = ranks(scores[row, [right]], scores[row, wrong], [len(wrong)])[0]
    return found


def _checked(layers: Sequence[int] | None, model: Model) -> list[int]:
    last = model.n_layers - 1
    if layers is None:
        return sorted(set(np.linspace(0, last - 1, min(8, last)).round().astype(int).tolist())) if last else []
    wrong = [layer for layer in layers if not 0 <= layer < last]
    if wrong or not layers:
        raise InputError(
            f"layers {list(layers)}: probes read the layers 0 to {last - 1} of {model.name}; choose of those"
        )
    return sorted(set(layers))


def _mean(values: Float[np.ndarray, " fact"]) -> float:
    return float(np.nanmean(values))
