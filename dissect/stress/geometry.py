"""Geometry of states and weights: baselines that describe how far unlearning moved a model, and prove nothing.

Linear CKA of two models' states X and Y (Kornblith et al. 1905.00414; debiased as in Nguyen et al. 2010.15327):

    CKA = HSIC(XX', YY') / sqrt(HSIC(XX', XX') HSIC(YY', YY'))

and with a never model N, for the base F and the unlearned model U, the CKA erasure score that the UDS paper
(2605.24614) compares with, weighted over layers as UDS is:

    score_l = clip((CKA(U, N) - CKA(F, N)) / (1 - CKA(F, N)), 0, 1),    weight_l = 1 - CKA(F, N)

A result is no `StressResult`: it has no value per fact, no rung of the claim ladder, and no verdict may rest on it. A
model that was trained on for as long without the facts moves too.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.model import Model
from dissect.stress.core.case import Case
from dissect.stress.core.residual_stream import states_at
from unlearning.common.errors import InputError

FAMILIES = ("embed", "attn_weights", "key_vectors", "value_vectors", "norms", "unembed")
"""Weight sites whose change is told; see `dissect.models.sites.WEIGHT_SITES`."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """How far a pair is apart.

    Attributes:
        layers: one row per block: `layer`, `cka_unlearned_base`, and with a never model `cka_unlearned_control`,
            `cka_base_control` and `erasure`; NaN where a model's states do not vary.
        erasure: the CKA erasure score, 0 as the base to 1 as the never model; None without a never model, or where
            base and never have the same states.
        weights: one row per family of tensors and layer: `family`, `layer` (-1 outside the blocks), `norm_base`,
            `norm_change` (Frobenius) and `relative_change`.
        n_states: answer positions behind the CKA.
        seconds: wall time.
    """

    layers: pd.DataFrame
    erasure: float | None
    weights: pd.DataFrame
    n_states: int
    seconds: float


def geometry(case: Case) -> Geometry:
    """CKA of the states at the answer positions of the forget facts, and the relative change of the weights.

    Raises:
        InputError: fewer than four answer positions, for which CKA has no debiased estimate.
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
        # As far as rounding goes, equal states leave nothing to move.
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
    """Debiased linear CKA of two sets of states of the same positions; NaN where one does not vary.

    About 0 for unrelated states however wide they are, where the plain estimate goes to 1 as rows get few; it can be
    a little below 0.

    Raises:
        InputError: fewer than four rows.
    """
    if len(x) < 4:
        raise InputError(f"debiased CKA needs four answer positions, and there are {len(x)}; give more prompts")
    grams = [_gram(x), _gram(y)]
    xy, xx, yy = (hsic(*pair) for pair in ((grams[0], grams[1]), (grams[0], grams[0]), (grams[1], grams[1])))
    return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else float("nan")


def hsic(k: Float[Tensor, "row row"], el: Float[Tensor, "row row"]) -> float:
    """The unbiased estimate of HSIC from two Gram matrices (Song et al. 2012), of four rows or more."""
    n = len(k)
    k, el = (gram - torch.diag(gram.diagonal()) for gram in (k, el))
    trace = (k * el).sum()
    means = k.sum() * el.sum() / ((n - 1) * (n - 2))
    cross = 2 * (k.sum(0) * el.sum(0)).sum() / (n - 2)
    return float((trace + means - cross) / (n * (n - 3)))


def _gram(states: Float[Tensor, "row width"]) -> Float[Tensor, "row row"]:
    # Centring changes no estimate; it keeps the digits of states that lie far from the origin.
    states = states.double()
    states = states - states.mean(0)
    return states @ states.mT


def weight_changes(base: Model, unlearned: Model) -> pd.DataFrame:
    """Frobenius norms of what unlearning did to each family of tensors in each layer; see `Geometry.weights`."""
    rows = []
    for family in FAMILIES:
        for place in ("before", *range(base.n_layers), "after"):
            names = base.weights.at([family], place)
            if names:
                norm, change = _norms(base, unlearned, names)
                rows.append(
                    {
                        "family": family,
                        "layer": place if isinstance(place, int) else -1,
                        "norm_base": norm,
                        "norm_change": change,
                        "relative_change": change / norm if norm > 0 else float("nan"),
                    }
                )
    return pd.DataFrame(rows)


def _norms(base: Model, unlearned: Model, names: Iterable[str]) -> tuple[float, float]:
    norm = change = 0.0
    for name in names:
        ours, theirs = base.hf.get_parameter(name).data, unlearned.hf.get_parameter(name).data
        norm += float(ours.double().square().sum())
        change += float((theirs.to(ours.device).double() - ours.double()).square().sum())
    return norm**0.5, change**0.5
