"""Restore weights of the base in the unlearned model, window by window (2410.06606)."""

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
    """Restore the base's weights in the unlearned model, window by window, and score the recovery.

    Source: Dissecting Fine-Tuning Unlearning in Large Language Models (2410.06606), section 3.

    Args:
        pair: The base (the donor) and the unlearned model (the target).
        prompts: Prompts with answers; see `load_prompts`.
        sites: Weights to restore, such as `["value_vectors", "key_vectors"]`, also together with patched
            activations, such as `value_vectors+mlp_coef`. By default `value_vectors`, the paper's, unless
            `parameters` is given.
        parameters: A regular expression over Hugging Face's parameter names. Matching parameters of a window's layers
            are restored with the window, matching parameters outside the layers in every window.
        window: Layers touched together: an odd width (clipped at the ends of the model), `prefix`, `suffix`,
            `layers 3,7,12-15`, or several of these. By default 5, 1 and `suffix`.
        control: A model never trained on the knowledge, from the same pretrained model as the base, into which the
            same sweep is run: a loaded model, a name or path, None, or `auto` (the control of a built-in pair).
        direction: `base-to-unlearned` asks whether the base's weights are enough to bring the knowledge back;
            `unlearned-to-base` asks whether the unlearned model's weights are enough to break the base, and scores
            the recovery of the unlearned model's behaviour.
        donor: Additional donors, each run as an arm of its own: a third model, by name or loaded.
            `base` stands for none.
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
            not finite, or not even one example and intervention fits into memory;
            the model does not have the weights; or `parameters` is no regular expression or matches nothing.

    Examples:
        >>> from dissect import load_pair, load_prompts, restore
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> result = restore(pair, prompts, sites=["value_vectors"], window=3, progress=False)
        >>> sorted(set(result.frame["kind"]))
        ['restore']
        >>> restore(pair, prompts, parameters="down_proj", window=3, progress=False).frame["site"][0]
        '/down_proj/'
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
    """Return the sets of sites to restore.

    Args:
        sites: Names of weights, or None.
        parameters: A regular expression over parameter names, or None.

    Returns:
        The named sets, then the expression's; the paper's sites where neither is given.

    Raises:
        InputError: A name is unknown, or the expression is broken.
    """
    named = parse_sites(sites, weights=True) if sites is not None else ()
    matched = (check_regex(parameters),) if parameters is not None else ()
    return (*named, *matched) or RESTORE_SITES
