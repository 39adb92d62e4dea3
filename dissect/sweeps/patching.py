"""Patch activations of the base into the unlearned model, window by window (2410.06606)."""

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
    """Patch the base's activations into the unlearned model, window by window, and score the recovery.

    Source: Dissecting Fine-Tuning Unlearning in Large Language Models (2410.06606), section 3.

    Args:
        pair: The base (the donor) and the unlearned model (the target).
        prompts: Prompts with answers; see `load_prompts`.
        sites: Activations to patch, sites that are patched together joined by `+`. By default the paper's three:
            `["mlp_coef", "attn_out", "mlp_coef+attn_out"]`.
        window: Layers touched together: an odd width (clipped at the ends of the model), `prefix`, `suffix`,
            `layers 3,7,12-15`, or several of these. By default 5, 1 and `suffix`.
        control: A model never trained on the knowledge, from the same pretrained model as the base, into which the
            same sweep is run: a loaded model, a name or path, None, or `auto` (the control of a built-in pair).
        direction: `base-to-unlearned` asks whether the base's activations are enough to bring the knowledge back;
            `unlearned-to-base` asks whether the unlearned model's activations are enough to break the base, and scores
            the recovery of the unlearned model's behaviour.
        donor: Additional donors, each run as an arm of its own: `other-question` (the base on
            another prompt), `noise` (of the activation's norm at every position), or a third model, by name or
            loaded. `base` stands for none.
        null: Number of null models that the same sweep is run into. A null model is the base, moved in random
            directions, each tensor as far as unlearning moved it.
        engine: `wavefront` runs all interventions in one pass over the layers, `reference` one forward pass each.
            Engines differ in speed, and in KRS by at most 1e-4.
        batch_size: Largest number of prompts in a batch.
        chunk_tokens: Number of tokens that go through a block together. By default measured on the machine.
        max_memory: Bytes that the process may hold, weights included (with a GPU: on the GPU). By default most of
            the free memory. Work that does not fit is split.
        precision: Precision of float32 products on a GPU: `highest`, or `high` for TF32, which is faster and coarser.
        padding_side: Side on which batches are padded. No score depends on it.
        seed: Random seed (bootstrap, other questions, noise).
        out: Run directory, written while computing. A run that was killed continues from there.
        progress: Show a progress bar on stderr.
        processes: The processes that share the work. Each of them returns the whole result.

    Returns:
        The recovery of every example in every window, with curves, intervals, differences to the control, and figures.

    Raises:
        InputError: A site is unknown or missing in the model, a window does not fit, a prompt is longer than the
            context, a control or donor cannot be compared, the run directory holds another configuration, logits are
            not finite, or not even one example and intervention fits into memory.

    Examples:
        >>> from dissect import load_pair, load_prompts, patch
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> result = patch(pair, prompts, sites=["mlp_coef"], window=5, progress=False)
        >>> result.arms  # the built-in pair has a control
        ['main', 'control']
        >>> list(result.curve().columns[:9])
        ['arm', 'target', 'donor', 'site', 'window', 'centre', 'first_layer', 'last_layer', 'krs']
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
