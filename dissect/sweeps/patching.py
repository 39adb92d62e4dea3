"""The layer sweep of activations: the base's in the unlearned model, window by window (2410.06606)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from dissect.interventions.arms import Direction
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.models.sites import PATCH_SITES, parse_sites
from dissect.prompts.prompts import Prompts
from dissect.runtime.precision import Precision
from dissect.runtime.processes import ALONE, Processes
from dissect.sweeps.result import SweepResult
from dissect.sweeps.run import Settings, run_layer_sweep


def patch(
    pair: ModelPair,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] | None = None,
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
    """Patch the base's activations into the unlearned model, window by window, and score what comes back.

    Args:
        pair: base (the donor) and unlearned (the target).
        prompts: what to ask; see `load_prompts`.
        sites: what to patch, as `["mlp_coef", "attn_out", "mlp_coef+attn_out"]` (the default, the paper's three).
        window: layers replaced together: an odd width (clipped at the ends of the model), `prefix`, `suffix`,
            `layers 3,7,12-15`, or several of these; by default 5, 1 and `suffix`.
        control: a model that never knew, from the same trunk as the base, into which the same sweep is run: a
            name or a loaded model, None for none, or `auto`, which knows the built-in pairs' control.
        direction: `base-to-unlearned`: is it enough to bring the knowledge back? `unlearned-to-base`: does it break
            the base? Scores are then recovery of the unlearned model's behaviour.
        donor: donors that are run beside the pair's own, to be subtracted: `other-question` (the base on another
            prompt), `noise` (of the same norm at every position), or a third model, by name or loaded.
        null: how many models to run the same sweep into that were moved from the base in random directions, each
            tensor as far as unlearning moved it.
        engine: `wavefront`, every intervention in one pass over the layers, or `reference`, one forward each;
            engines differ in speed, never in numbers.
        batch_size: most prompts in one batch.
        chunk_tokens: tokens that go through a block at once; measured on the machine at hand unless given.
        max_memory: bytes that the process may hold altogether, weights included (with a GPU: on the GPU); by
            default most of what is free. Work that does not fit is cut.
        precision: of float32 products on a GPU: `highest`, or `high` for TF32, which is faster and coarser.
        padding_side: no score depends on it; for tests of exactly that.
        seed: of the bootstrap draws, of which other question is asked, and of noise.
        out: run directory to write to while computing; a killed run goes on from there.
        progress: show a progress bar on stderr.
        processes: those that share the work; each gets the whole result.

    Raises:
        InputError: an unknown or missing site, a window that does not fit, a prompt longer than the context, a
            control or donor that cannot be compared, a run directory of another configuration, logits that are not
            finite, too little memory for even one example and intervention.
    """
    settings = Settings(
        sites=parse_sites(sites) if sites is not None else PATCH_SITES,
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
    return run_layer_sweep("patch", pair, prompts, settings, out=out, progress=progress, processes=processes)
