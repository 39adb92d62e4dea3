r"""How far the MLP coefficients of two models lie apart, layer by layer, at the answer positions (2410.06606).

With m_b the base's coefficients of a layer at a position and m_u the other model's:

    cosine           m_u . m_b / (|m_u| |m_b|)
    relative change  |m_u - m_b| / |m_b|
    norm ratio       |m_u| / |m_b|
    sign changed     share of coefficients with sign(m_u) != sign(m_b); with a ReLU: switched on or off
    squared change   |m_u - m_b|^2

each a mean over an example's answer positions. A layer's part in the whole change is its squared change as a share
of the sum over all layers.
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
from unlearning.common.errors import InputError

CHANGES = ("cosine", "relative_change", "norm_ratio", "sign_changed", "squared_change")
"""The columns of `coefficient_changes` that are measurements."""


def change_of(
    base: Float[Tensor, "scored d_mlp"], other: Float[Tensor, "scored d_mlp"]
) -> dict[str, Float[Tensor, " scored"]]:
    """The measurements of this module's head, per position; NaN where the base has no coefficient but 0."""
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
    """How far another model's MLP coefficients are from the base's, per example and layer.

    Args:
        base: what is compared to.
        other: a model of the same shape.
        prompts: both read them; only answer positions count.
        batch_size: most prompts in one batch; no number depends on it.

    Returns:
        One row per example and layer: `example_index`, `example`, `group`, `layer`, and the measurements of this
        module's head (`cosine`, `relative_change`, `norm_ratio`, `sign_changed`, `squared_change`).

    Raises:
        InputError: a mixture of experts, a streamed model, a batch size below 1.
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
    """Batch by batch the coefficients of both models at the scored positions.

    Raises:
        InputError: a mixture of experts, a streamed model, a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: at least 1")
    check_coefficients(base, other)
    for batch in prompts.batches(batch_size):
        ours = scored_coefficients(base, batch)
        yield batch, ours, scored_coefficients(other, batch).to(ours.device)


def last_layers_share(changes: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Share of the total squared change that sits in the last k layers, for every k.

    Args:
        changes: of `coefficient_changes`.
        seed: of the bootstrap draws over examples (groups, where there are any).

    Returns:
        One row per k: `last_layers`, `first_layer`, `share` (ratio of the examples' means) with `share_low` and
        `share_high`, and `even`, what a change that is spread evenly over the layers would have. NaN where nothing
        changed.
    """
    table = changes.pivot(index="example_index", columns="layer", values="squared_change").sort_index()
    groups = changes.drop_duplicates("example_index").sort_values("example_index")["group"].tolist()
    bootstrap = Bootstrap(groups, seed=seed)
    squared = table.to_numpy(np.float64)
    # Counted from the end, so that the share of all layers is 1 to the last bit.
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
