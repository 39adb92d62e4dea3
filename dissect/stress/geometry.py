"""Geometry of states and weights: baselines that describe how far unlearning moved a model. They prove nothing.

Linear CKA of two models' states X and Y (Kornblith et al. 1905.00414; debiased as in Nguyen et al. 2010.15327):

    CKA = HSIC(XX', YY') / sqrt(HSIC(XX', XX') HSIC(YY', YY'))

With a control N, the base F and the unlearned model U, the CKA erasure score that the UDS paper (2605.24614) compares
with, weighted over layers as UDS is:

    score_l = clip((CKA(U, N) - CKA(F, N)) / (1 - CKA(F, N)), 0, 1),    weight_l = 1 - CKA(F, N)

The result is not a `StressResult`: it has no value per fact and no evidence level, and no verdict may rest on it. A
model that was trained for as long without the facts moves as well.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.model import Model
from dissect.models.module_tree import tensor_at
from dissect.stress.core.case import Case
from dissect.stress.core.residual_stream import states_at
from unlearning.common.errors import InputError

FAMILIES = ("embed", "attn_weights", "key_vectors", "value_vectors", "router", "norms", "unembed")
"""Weight sites whose change is measured; see `dissect.models.sites.WEIGHT_SITES`."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """How far the models of a pair are apart.

    Attributes:
        layers: One row per block: `layer`, `cka_unlearned_base`, and with a control `cka_unlearned_control`,
            `cka_base_control` and `erasure`; NaN if a model's states do not vary.
        erasure: The CKA erasure score, from 0 (as the base) to 1 (as the control); None without a control, or if base
            and control have the same states.
        weights: One row per family of tensors and layer: `family`, `layer` (-1 outside the blocks), `norm_base`,
            `norm_change` (Frobenius) and `relative_change`.
        n_states: Number of answer positions that the CKA is computed on.
        seconds: Wall time in seconds.
    """

    layers: pd.DataFrame
    erasure: float | None
    weights: pd.DataFrame
    n_states: int
    seconds: float


def geometry(case: Case) -> Geometry:
    """Compute the CKA of the states at the forget facts' answer positions, and the relative change of the weights.

    Args:
        case: Models and facts.

    Returns:
        The distances.

    Raises:
        InputError: There are fewer than four answer positions, for which debiased CKA is not defined.
    """
    started = time.perf_counter()
    prompts = case.forget.prompts
    states = {
        role: states_at(model, prompts, prompts.items, batch_size=case.batch_size)[1:]
        for role, model in case.models.items()
    }
    pairs = [("unlearned", "base")] + ([("unlearned", "control"), ("base", "control")] if "control" in states else [])
    rows = []
    for layer in range(case.pair.n_layers):
        here = {role: of_role[layer].to(case.pair.base.device) for role, of_role in states.items()}
        rows.append({"layer": layer} | {f"cka_{a}_{b}": linear_cka(here[a], here[b]) for a, b in pairs})
    layers = pd.DataFrame(rows)
    score = None
    if "control" in states:
        towards, from_start = layers["cka_unlearned_control"], layers["cka_base_control"]
        # States that are equal up to rounding leave nothing to move.
        weight = (1 - from_start).where(1 - from_start > 1e-6, 0.0)
        layers["erasure"] = ((towards - from_start) / weight.where(weight > 0)).clip(0, 1)
        total = float(weight[layers["erasure"].notna()].sum())
        score = float((weight * layers["erasure"]).sum()) / total if total > 0 else None
    return Geometry(
        layers=layers,
        erasure=score,
        weights=weight_changes(case.pair.base, case.pair.unlearned),
        n_states=states["base"].shape[1],
        seconds=time.perf_counter() - started,
    )


def linear_cka(x: Float[Tensor, "row d_x"], y: Float[Tensor, "row d_y"]) -> float:
    """Return the debiased linear CKA of two sets of states at the same positions.

    It is about 0 for unrelated states of any width, where the plain estimate tends to 1 for few rows; it can be
    slightly below 0.

    Args:
        x: States of one model.
        y: States of the other model, in the same order.

    Returns:
        The CKA; NaN if one set of states does not vary.

    Raises:
        InputError: There are fewer than four rows.
    """
    if len(x) < 4:
        raise InputError(f"debiased CKA needs at least 4 answer positions, got {len(x)}. Give more prompts")
    grams = [_gram(x), _gram(y)]
    xy, xx, yy = (hsic(*pair) for pair in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1])))
    return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else float("nan")


def hsic(k: Float[Tensor, "row row"], el: Float[Tensor, "row row"]) -> float:
    """Return the unbiased estimate of HSIC from two Gram matrices (Song et al. 2012).

    Args:
        k: Gram matrix of the first states, of at least four rows.
        el: Gram matrix of the second states, of the same size.

    Returns:
        The estimate.
    """
    n = len(k)
    k, el = (gram - torch.diag(gram.diagonal()) for gram in (k, el))
    trace = (k * el).sum()
    means = k.sum() * el.sum() / ((n - 1) * (n - 2))
    cross = 2 * (k.sum(0) * el.sum(0)).sum() / (n - 2)
    return float((trace + means - cross) / (n * (n - 3)))


def _gram(states: Float[Tensor, "row width"]) -> Float[Tensor, "row row"]:
    # Centring does not change the estimates; it avoids cancellation for states far from the origin.
    states = states.double()
    states = states - states.mean(0)
    return states @ states.mT


def weight_changes(base: Model, unlearned: Model) -> pd.DataFrame:
    """Compute the Frobenius norms of the change of each family of tensors in each layer.

    Args:
        base: The model before unlearning.
        unlearned: The model after unlearning.

    Returns:
        One row per family and layer; see `Geometry.weights`.
    """
    rows = []
    for family in FAMILIES:
        for index in ("before", *range(base.n_layers), "after"):
            names = base.weights.at([family], index)
            if names:
                norm, change = _norms(base, unlearned, names)
                rows.append(
                    {
                        "family": family,
                        "layer": index if isinstance(index, int) else -1,
                        "norm_base": norm,
                        "norm_change": change,
                        "relative_change": change / norm if norm > 0 else float("nan"),
                    }
                )
    return pd.DataFrame(rows)


def _norms(base: Model, unlearned: Model, names: Iterable[str]) -> tuple[float, float]:
    """Return the Frobenius norm of the base's parameters, and that of their change."""
    norm = change = 0.0
    for name in names:
        ours, theirs = tensor_at(base.hf, name), tensor_at(unlearned.hf, name)
        norm += float(ours.double().square().sum())
        change += float((theirs.to(ours.device).double() - ours.double()).square().sum())
    return norm**0.5, change**0.5
