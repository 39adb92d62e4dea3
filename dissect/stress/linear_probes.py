"""Linear probes: is the answer a linear function of the state that predicts it, fitted on other people's facts?

Open answers hardly ever repeat, so a classifier has nothing to learn. The probe is therefore a ridge regression from
the state at the question's last position to the answer's embedding, and an answer's score is the cosine between its
embedding and the predicted one. The probe is fitted on the facts of T (retain facts, and forget facts of other groups)
and evaluated on V. If the answers come from few classes, a multinomial logistic regression is fitted as well.
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
"""Ridge penalties that cross-validation chooses from; features have unit variance."""

INNER_FOLDS = 3
MAX_CLASSES = 16
"""Maximum number of different answers for the classifier."""
MIN_PER_CLASS = 5

EMBEDDING = "embeddings"
"""Name of the baseline probe that reads the input of the first block."""


def linear_probes(case: Case, *, layers: Sequence[int] | None = None, folds: int = 5) -> StressResult:
    """Rank the answers by linear probes that were fitted on other groups' facts.

    Variants are named such as `own probe, layer 3` (fitted on each model's own states), `base's probe, layer 3` (fitted
    on the base's states and applied to all models) and, for few different answers, `classifier, layer 3`. The last
    layer, which is the output, is not probed. Measures: `rank` decides; `selectivity` is `rank` minus that of a probe
    fitted to shuffled answers.

    Args:
        case: Models and facts.
        layers: Layers whose outputs are read; by default at most eight, evenly spaced over all but the last.
        folds: Number of folds of the forget facts' groups; each fold is evaluated by a probe fitted without it.

    Returns:
        The result of the test `linear_probes`.

    Raises:
        InputError: There are too few groups to split, or a layer does not exist.
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
    for boundary in [0, *(layer + 1 for layer in chosen)]:
        where = f"layer {boundary - 1}" if boundary else EMBEDDING
        here = {role: of_role[boundary].to(base.device) for role, of_role in states.items()}
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
                if boundary:
                    rows.append((role, f"{name}, {where}", {"rank": rank, "selectivity": rank - control}))
            if boundary and split.is_classification:
                rows.append(
                    (role, f"classifier, {where}", {"rank": class_ranks(of_role.cpu().numpy(), case.forget, split)})
                )
    return StressResult(
        test="linear_probes",
        level=1,
        measure="rank",
        frame=value_rows(case.forget, rows),
        proves=(
            "rho > 0: a linear map that was fitted on other groups' facts reads these answers from the states "
            "before the last layer, so they are decodable. It does not show that the model uses them. rho = 0 shows"
            " only that no linear map at this position reads them."
        ),
        settings={"layers": chosen, "folds": folds, "alphas": list(ALPHAS), "position": "last of the question"},
        seconds=time.perf_counter() - started,
        # No floor without a control: the best of many probes is above chance, and the question type alone predicts part
        # of the answer.
        floors={},
        notes=()
        if split.is_classification
        else ("there are too many different answers for a classifier, so only the regression is fitted",),
        seed=case.seed,
        tables={"probes": pd.DataFrame(means)},
    )


@dataclass(frozen=True, eq=False)
class Split:
    """Forget facts followed by retain facts, and which of them a probe is fitted on (T) and evaluated on (V).

    Attributes:
        prompts: All facts.
        groups: Number of each fact's group.
        folds: For each fold, the indices of T and of V.
        is_classification: Whether the answers come from few classes.
    """

    prompts: Prompts
    groups: Int[np.ndarray, " fact"]
    folds: tuple[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]], ...]
    is_classification: bool

    @classmethod
    def of(cls, case: Case, n_folds: int) -> "Split":
        """Split the groups of the forget facts into folds. Retain facts of other groups are in every T.

        Args:
            case: Models and facts.
            n_folds: Number of folds.

        Returns:
            The split.

        Raises:
            InputError: There are too few groups for the folds.
        """
        forget = case.forget.prompts.items
        names = {item.group for item in forget} - {""}
        others = () if case.retain is None else case.retain.prompts.items
        items = (*forget, *(item for item in others if item.group not in names))
        keys = [item.group or f"fact {index}" for index, item in enumerate(items)]
        groups = np.unique(keys, return_inverse=True)[1]
        n_groups = len(set(groups[: len(forget)]))
        if not 2 <= n_folds <= n_groups or len(set(groups)) - -(-n_groups // n_folds) < INNER_FOLDS:
            raise InputError(
                f"`folds` must fit the number of groups, but {n_groups} groups of forget facts cannot be split into "
                f"{n_folds} folds: probes need other groups to be fitted on. Give facts of more groups"
            )
        rest = np.arange(len(forget), len(items))
        parts = GroupKFold(n_folds).split(np.zeros(len(forget)), groups=groups[: len(forget)])
        folds = tuple((np.concatenate([train, rest]), test) for train, test in parts)
        answers = [item.answer for item in items]
        few = len(set(answers)) <= min(MAX_CLASSES, len(answers) // MIN_PER_CLASS)
        return cls(replace(case.forget.prompts, items=items), groups, folds, few)


@dataclass(frozen=True, eq=False)
class Answers:
    """Embeddings of answers: the first token's row of the base's unembedding, and the mean over all tokens' rows.

    Attributes:
        right: Of every fact, forget facts before retain facts.
        distractors: Of the distractors of the forget facts, fact by fact.
        counts: Number of distractors of each forget fact.
    """

    right: Float[Tensor, "fact two_d_model"]
    distractors: Float[Tensor, "distractor two_d_model"]
    counts: list[int]

    @classmethod
    def of(cls, base: Model, forget: Facts, prompts: Prompts) -> "Answers":
        """Embed the answers of all facts and the distractors of the forget facts.

        Args:
            base: The model whose unembedding is used.
            forget: Forget facts with their distractors.
            prompts: All facts, forget facts first.

        Returns:
            The embeddings.
        """
        table = base.hf.get_output_embeddings().weight.detach()

        def embedded(items: Sequence[Prompt]) -> Float[Tensor, "item two_d_model"]:
            rows = []
            for item in items:
                tokens = table[list(item.input_ids[item.answer_start :])].float()
                rows.append(torch.cat([tokens[0], tokens.mean(0)]))
            return torch.stack(rows).to(base.device) if rows else torch.zeros(0, 2 * table.shape[1], device=base.device)

        distractors = [item for several in forget.distractors for item in several]
        return cls(embedded(prompts.items), embedded(distractors), [len(several) for several in forget.distractors])


def _questions(prompts: Prompts) -> list[Prompt]:
    """Return the questions alone, scored at their last position, which predicts the answer's first token."""
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
    """Rank the forget facts' answers by the ridge probe, and by a probe fitted to shuffled answers.

    Args:
        train: States that the probe is fitted on.
        asked: States that the probe is applied to, of the same facts, for one or several models.
        answers: Embeddings of the answers.
        split: Which facts are in T and V.
        shuffled: A permutation of the facts, which shuffles the answers of T.

    Returns:
        For each of `asked`, the ranks by the probe and by the probe of shuffled answers.
    """
    width = answers.right.shape[1]
    fact = np.repeat(np.arange(len(answers.counts)), answers.counts)
    found = [np.full((2, len(answers.counts)), np.nan) for _ in asked]
    for indices, test in split.folds:
        inside = indices[np.argsort(shuffled[indices])]
        mean, spread = train[indices].mean(0), train[indices].std(0, correction=0)
        # Constant features, such as the embedding of a last token that all questions share, are switched off.
        scale = torch.where(spread > 1e-6 * spread.max().clamp(min=1e-6), spread, torch.inf)
        features = (train[indices] - mean) / scale
        centre = answers.right[indices].mean(0)
        targets = torch.cat([answers.right[indices] - centre, answers.right[inside] - centre], dim=1)
        alpha = best_alpha(features, targets[:, :width], split.groups[indices])
        (weights,) = ridge(features, targets, [alpha])
        here = np.isin(fact, test)
        candidates, counts = answers.distractors[here] - centre, [answers.counts[index] for index in test]
        for of_model, states in zip(found, asked, strict=True):
            predicted = ((states[test] - mean) / scale) @ weights
            for row, embedding in enumerate(predicted.split(width, dim=1)):
                right = torch.cosine_similarity(embedding, answers.right[test] - centre)
                others = torch.cosine_similarity(embedding[np.searchsorted(test, fact[here])], candidates)
                of_model[row, test] = ranks(right.cpu().numpy(), others.cpu().numpy(), counts)
    return found


def ridge(
    features: Float[Tensor, "fact d_in"], targets: Float[Tensor, "fact d_out"], alphas: Sequence[float]
) -> list[Float[Tensor, "d_in d_out"]]:
    """Return W = (X'X + alpha)^-1 X'Y, ridge regression without intercept, for several alphas from one decomposition.

    This is scikit-learn's estimate, computed on the states' device: it is fitted hundreds of times, on targets as wide
    as the model.

    Args:
        features: X.
        targets: Y.
        alphas: The penalties.

    Returns:
        W for each penalty.
    """
    u, s, vh = torch.linalg.svd(features.double(), full_matrices=False)
    projected = u.mT @ targets.double()
    return [(vh.mT @ (projected * (s / (s.square() + alpha))[:, None])).to(features.dtype) for alpha in alphas]


def best_alpha(
    features: Float[Tensor, "fact d_in"], targets: Float[Tensor, "fact d_out"], groups: Int[np.ndarray, " fact"]
) -> float:
    """Return the penalty of `ALPHAS` with the smallest squared error on left-out groups.

    Args:
        features: States of the facts, standardised.
        targets: Embeddings of their answers, centred.
        groups: Number of each fact's group.

    Returns:
        The penalty.
    """
    errors = torch.zeros(len(ALPHAS), dtype=torch.float64)
    for fitted, left in GroupKFold(INNER_FOLDS).split(np.zeros(len(groups)), groups=groups):
        for index, weights in enumerate(ridge(features[fitted], targets[fitted], ALPHAS)):
            errors[index] += float((features[left] @ weights - targets[left]).square().sum())
    return ALPHAS[int(errors.argmin())]


def class_ranks(states: Float[np.ndarray, "fact d_model"], forget: Facts, split: Split) -> Float[np.ndarray, " forget"]:
    """Rank the forget facts' answers by a multinomial logistic regression.

    Args:
        states: States of the facts of `split`.
        forget: The forget facts with their distractors; distractors that are no answer in T are left out.
        split: Which facts are in T and V.

    Returns:
        Ranks; NaN for an answer that no fact in T has.
    """
    answers = np.array([item.answer for item in split.prompts.items])
    found = np.full(len(forget), np.nan)
    for indices, test in split.folds:
        if len(set(answers[indices])) < 2:
            continue
        probe = GridSearchCV(
            make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
            {"logisticregression__C": [0.01, 0.1, 1.0]},
            cv=GroupKFold(INNER_FOLDS),
        ).fit(states[indices], answers[indices], groups=split.groups[indices])
        column = {str(name): index for index, name in enumerate(probe.classes_)}
        scores = probe.predict_log_proba(states[test])
        for row, index in enumerate(test):
            right = column.get(answers[index])
            others = [column[item.answer] for item in forget.distractors[index] if item.answer in column]
            if right is not None and others:
                found[index] = ranks(scores[row, [right]], scores[row, others], [len(others)])[0]
    return found


def _checked(layers: Sequence[int] | None, model: Model) -> list[int]:
    """Return the sorted layers; at most eight, evenly spaced, for None.

    Raises:
        InputError: A layer does not exist or is the last one, or none is given.
    """
    last = model.n_layers - 1
    if layers is None:
        return sorted(set(np.linspace(0, last - 1, min(8, last)).round().astype(int).tolist())) if last else []
    missing = [layer for layer in layers if not 0 <= layer < last]
    if missing or not layers:
        raise InputError(
            f"`layers` must be from 0 to {last - 1} for {model.name} (the last layer is the output), got {list(layers)}"
        )
    return sorted(set(layers))


def _mean(values: Float[np.ndarray, " fact"]) -> float:
    return float(np.nanmean(values))
