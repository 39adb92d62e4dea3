"""The layer sweep of weights: the base's in the unlearned model, window by window (2410.06606)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dissect.interventions.arms import Direction
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.models.sites import RESTORE_SITES, SiteSet, parse_sites
from dissect.prompts.prompts import Prompts
from dissect.runtime.precision import Precision
from dissect.runtime.processes import ALONE, Processes
from dissect.sweeps.result import SweepResult
from dissect.sweeps.run import Settings, check_regex, run_layer_sweep


def restore(
    pair: ModelPair,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] | None = None,
    parameters: str | None = None,
    window: int | str | Sequence[int | str] | None = None,
    control: str | Model | None = "auto",
    direction: Direction = "base-to-unlearned",
    donor: str | Model | Sequence[str | Model] = "base",
    null: int = 0,
    engine: str = "wavefront",
    batch_size: int = 16,
    chunk_tokens: int | None = None,
    max_memory: int | None = None,
    precision: Precision = "highest",
    padding_side: Literal["left", "right"] = "right",
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> SweepResult:
    """Put the base's weights back into the unlearned model, window by window, and score what comes back.

    Everything that is not explained here is as in `patch`.

    Args:
        pair: base (the donor) and unlearned (the target).
        prompts: what to ask; see `load_prompts`.
        sites: weights, as `["value_vectors", "key_vectors"]`, also together with patches, as
            `value_vectors+mlp_coef`; by default `value_vectors`, the paper's, unless `parameters` are given.
        parameters: a regular expression over Hugging Face's parameter names; what it matches in a window is restored,
            and what it matches outside the blocks is restored in every window.
        window: see `patch`.
        control: see `patch`.
        direction: see `patch`.
        donor: see `patch`; only a model can give weights.
        null: see `patch`.
        engine: see `patch`.
        batch_size: see `patch`.
        chunk_tokens: see `patch`.
        max_memory: see `patch`.
        precision: see `patch`.
        padding_side: see `patch`.
        seed: see `patch`.
        out: see `patch`.
        progress: see `patch`.
        processes: see `patch`.

    Raises:
        InputError: what `patch` raises, weights that the model does not have, an expression that matches nothing.
    """
    settings = Settings(
        sites=restored_sites(sites, parameters),
        window=window,
        control=control,
        direction=direction,
        donor=donor,
        null=null,
        engine=engine,
        batch_size=batch_size,
        chunk_tokens=chunk_tokens,
        max_memory=max_memory,
        precision=precision,
        padding_side=padding_side,
        seed=seed,
    )
    return run_layer_sweep("restore", pair, prompts, settings, out=out, progress=progress, processes=processes)


def restored_sites(sites: str | Sequence[str] | None, parameters: str | None) -> tuple[SiteSet, ...]:
    """The sets of sites that are meant by names, by a regular expression, or by neither.

    Raises:
        InputError: an unknown name, or a broken expression.
    """
    named = parse_sites(sites, weights=True) if sites is not None else ()
    matched = (check_regex(parameters),) if parameters is not None else ()
    return (*named, *matched) or RESTORE_SITES
