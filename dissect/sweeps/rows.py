"""Rows of the results table, from the logits of a sweep."""

from collections.abc import Iterator, Sequence
from typing import Any

from dissect.engine import Sweep
from dissect.interventions.arms import Arm
from dissect.interventions.intervention import Intervention
from dissect.models.sites import site_label
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.rows import RecoveryScorer, as_rows, example_columns


def score_sweep(
    sweep: Sweep,
    prompts: Prompts,
    batch: Batch,
    interventions: Sequence[Intervention],
    *,
    arm: Arm,
    model_name: str,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one batch, example by example within each intervention.

    Args:
        sweep: Logits of the batch.
        prompts: The prompts that the batch was made from.
        batch: The batch.
        interventions: The sweep's interventions, in its order.
        arm: The arm that was intervened on.
        model_name: The target's name in error messages.

    Yields:
        One row of `results.parquet`.

    Raises:
        InputError: Logits are not finite.
    """
    examples = example_columns(prompts, batch)
    scorer = RecoveryScorer(sweep.base, sweep.target, batch, name=model_name)
    for intervention, logits in zip(interventions, sweep.intervened, strict=True):
        place = {
            "arm": arm.name,
            "target": arm.target,
            "donor": arm.donor,
            "kind": intervention.kind,
            "site": site_label(intervention.sites),
            "window": intervention.window.kind,
            "centre": intervention.window.centre,
            "first_layer": intervention.window.first,
            "last_layer": intervention.window.last,
        }
        for row in as_rows(examples | scorer.columns(logits, intervention.label)):
            yield place | row
