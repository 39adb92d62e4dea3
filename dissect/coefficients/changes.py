r"""Measure how far apart the MLP coefficients of two models are, per layer, at the answer positions (2410.06606).

With m_b the base's coefficients of a layer at a position and m_u the other model's:

    cosine           m_u . m_b / (|m_u| |m_b|)
    relative change  |m_u - m_b| / |m_b|
    norm ratio       |m_u| / |m_b|
    sign changed     fraction of coefficients with sign(m_u) != sign(m_b); with a ReLU: switched on or off
    squared change   |m_u - m_b|^2

each averaged over an example's answer positions. A layer's share of the total change is its squared change divided by
the sum over all layers.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect.coefficients.hooks import check_coefficients, scored_coefficients
from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.recovery import per_example
from unlearning.common.bootstrap import Bootstrap
from unlearning.common.errors import check_at_least

CHANGES = ("cosine", "relative_change", "norm_ratio", "sign_changed", "squared_change")
"""Columns of `coefficient_changes` with measurements."""


def change_of(
    base: Float[Tensor, "scored d_mlp"], other: Float[Tensor, "scored d_mlp"]
) -> dict[str, Float[Tensor, " scored"]]:
    """Compute the measurements of the module's docstring at each position.

    Args:
        base: Coefficients of the base.
        other: Coefficients of the other model.

    Returns:
        By name, a float64 value per position; NaN if all of the base's coefficients are 0.
    """
    base, other = base.double(), other.double()
    base_norm, other_norm = base.norm(dim=-1), other.norm(dim=-1)
    change = (other - base).norm(dim=-1)
    of_base = torch.where(base_norm > 0, base_norm, torch.nan)
    both = of_base * torch.where(other_norm > 0, other_norm, torch.nan)
    return {
        "cosine": (base * other).sum(-1) / both,
        "relative_change": change / of_base,
        "norm_ratio": other_norm / of_base,
        "sign_changed": (base.sign() != other.sign()).double().mean(-1),
        "squared_change": change.square(),
    }


def coefficient_changes(base: Model, other: Model, prompts: Prompts, *, batch_size: int = 16) -> pd.DataFrame:
    """Measure how far another model's MLP coefficients are from the base's, per example and layer.

    Args:
        base: Base model.
        other: Model of the same shape.
        prompts: Prompts that both models read; only answer positions are measured.
        batch_size: Largest number of prompts per batch; does not change any number.

    Returns:
        One row per example and layer with the columns `example_index`, `example`, `group`, `layer`, `cosine`,
        `relative_change`, `norm_ratio`, `sign_changed` and `squared_change` (defined in the module's docstring).

    Raises:
        InputError: A model is a mixture of experts or streamed, or the batch size is below 1.
    """
    rows = []
    for batch, ours, theirs in paired_coefficients(base, other, prompts, batch_size=batch_size):
        n = len(batch.examples)
        for layer in range(base.n_layers):
            measured = {
                name: per_example(values, batch.rows.to(values.device), n).tolist()
                for name, values in change_of(ours[layer], theirs[layer]).items()
            }
            for row, example in enumerate(batch.examples):
                item = prompts.items[example]
                place = {"example_index": example, "example": item.id, "group": item.group, "layer": layer}
                rows.append(place | {name: values[row] for name, values in measured.items()})
    return pd.DataFrame(rows).sort_values(["example_index", "layer"], ignore_index=True)


def paired_coefficients(
    base: Model, other: Model, prompts: Prompts, *, batch_size: int
) -> Iterator[tuple[Batch, Float[Tensor, "layer scored d_mlp"], Float[Tensor, "layer scored d_mlp"]]]:
    """Yield the coefficients of both models at the scored positions, batch by batch.

    Args:
        base: Base model.
        other: Model of the same shape.
        prompts: Prompts that both models read.
        batch_size: Largest number of prompts per batch.

    Yields:
        The batch, the base's coefficients and the other model's, on the base's device.

    Raises:
        InputError: A model is a mixture of experts or streamed, or the batch size is below 1.
    """
    check_at_least("batch_size", batch_size, 1)
    check_coefficients(base, other)
    for batch in prompts.batches(batch_size):
        ours = scored_coefficients(base, batch)
        yield batch, ours, scored_coefficients(other, batch).to(ours.device)


def last_layers_share(changes: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Compute the share of the total squared change that is in the last k layers, for every k.

    Args:
        changes: Table of `coefficient_changes`.
        seed: Random seed of the bootstrap over examples (over groups, if the prompts have groups).

    Returns:
        One row per k with the columns `last_layers`, `first_layer`, `share` (ratio of means over examples) with
        `share_low` and `share_high` (95 %), and `even`, the share of a change that is spread evenly over the layers.
        NaN if nothing changed.
    """
    table = changes.pivot(index="example_index", columns="layer", values="squared_change").sort_index()
    groups = changes.drop_duplicates("example_index").sort_values("example_index")["group"].tolist()
    bootstrap = Bootstrap(groups, seed=seed)
    squared = table.to_numpy(np.float64)
    # Summed from the last layer on, so that the share of all layers is exactly 1.
    from_here = squared[:, ::-1].cumsum(1)
    total = from_here[:, -1] if from_here[:, -1].any() else np.full(len(squared), np.nan)
    n_layers = squared.shape[1]
    rows = []
    for k in range(1, n_layers + 1):
        share = bootstrap.ratio(from_here[:, k - 1], total)
        rows.append(
            {
                "last_layers": k,
                "first_layer": n_layers - k,
                "share": share.value,
                "share_low": share.low,
                "share_high": share.high,
                "even": k / n_layers,
            }
        )
    return pd.DataFrame(rows)
