"""Rows of a decomposition's tables, from the logits and measures of one batch."""

from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.recovery import per_example
from dissect.scoring.rows import Columns, example_columns

NO_CHANGE = "the output is the same in base and target: nothing to split"


def example_rows(
    where: dict[str, Any], batch: Batch, measures: dict[str, Tensor], recovery: Columns, problem: str, prompts: Prompts
) -> pd.DataFrame:
    """Return one row per example.

    Args:
        where: The columns that all rows share: arm, site, layers, term.
        batch: The batch.
        measures: Norms, shares and direct contributions, each of shape [scored]; averaged over positions.
        recovery: The columns of `RecoveryScorer.columns`.
        problem: The reason why there is no direct contribution, or "".
        prompts: The prompts that the batch was made from.

    Returns:
        The columns of `results.parquet`, in the order of the batch's examples.
    """
    means = {
        name: per_example(values, batch.rows, len(batch.examples)).cpu().numpy() for name, values in measures.items()
    }
    undefined = {"share_undefined": np.where(np.isnan(means["share"]), NO_CHANGE, ""), "direct_undefined": problem}
    return pd.DataFrame(where | example_columns(prompts, batch) | means | recovery | undefined)


def position_rows(where: dict[str, Any], batch: Batch, measures: dict[str, Tensor], prompts: Prompts) -> pd.DataFrame:
    """Return one row per scored position.

    Args:
        where: The columns that all rows share: arm, site, layers, term.
        batch: The batch.
        measures: Norms, shares and direct contributions, each of shape [scored].
        prompts: The prompts that the batch was made from.

    Returns:
        The columns of `positions.parquet`; `position` counts from the example's first scored one.
    """
    rows = batch.rows.cpu().numpy()
    first = np.searchsorted(rows, rows)  # positions of one example are neighbours
    indices = [batch.examples[row] for row in rows]
    kept = ("norm", "base_norm", "share", "direct", "direct_centred")
    return pd.DataFrame(
        {
            **where,
            "example": [prompts.items[index].id for index in indices],
            "example_index": indices,
            "position": np.arange(len(rows)) - first,
            "token": batch.next_tokens.cpu().numpy(),
            **{name: measures[name].cpu().numpy() for name in kept},
        }
    )
