"""The layer sweep: activations of the base in the unlearned model, window by window (2410.06606)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dissect import zoo
from dissect.engine import find_engine
from dissect.engine.layers import Streamed
from dissect.engine.memory import memory_budget
from dissect.engine.plan import Plan, make_plan
from dissect.interventions import centred_windows, sweep
from dissect.pairs import Model, ModelPair, check_comparable, load_model
from dissect.precision import Precision, matmul_precision
from dissect.processes import ALONE, Processes
from dissect.prompts import Prompts
from dissect.results import PatchingResult, load_result
from dissect.runs import Run, Stopwatch, open_run
from dissect.sites import DEFAULT_SITES, SiteSet, parse_sites, site_label
from dissect.sweeping import Work, run_sweep
from unlearning.errors import InputError


def patch(
    pair: ModelPair,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] | None = None,
    window: int = 5,
    control: str | Model | None = "auto",
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
) -> PatchingResult:
    """Patch the base's activations into the unlearned model, window by window, and score what comes back.

    Args:
        pair: base (the donor) and unlearned (the target).
        prompts: what to ask; see `load_prompts`.
        sites: what to patch, as `["mlp_coef", "attn_out", "mlp_coef+attn_out"]` (the default, the paper's three).
        window: layers patched together, odd; clipped at the ends of the model.
        control: a model that never knew, from the same trunk as the base, into which the same sweep is run: a
            name or a loaded model, None for none, or `auto`, which knows the built-in pairs' control.
        engine: `wavefront`, every intervention in one pass over the layers, or `reference`, one forward each;
            engines differ in speed, never in numbers.
        batch_size: most prompts in one batch.
        chunk_tokens: tokens that go through a block at once; measured on the machine at hand unless given.
        max_memory: bytes that the process may hold altogether, weights included (with a GPU: on the GPU); by
            default most of what is free. Work that does not fit is cut.
        precision: of float32 products on a GPU: `highest`, or `high` for TF32, which is faster and coarser.
        padding_side: no score depends on it; for tests of exactly that.
        seed: of the bootstrap draws.
        out: run directory to write to while computing; a killed run goes on from there.
        progress: show a progress bar on stderr.
        processes: those that share the work; each gets the whole result.

    Raises:
        InputError: an unknown or missing site, a window that does not fit, a prompt longer than the context, a
            control that cannot be compared, a run directory of another configuration, logits that are not finite,
            too little memory for even one example and intervention.
    """
    clock = Stopwatch()
    if seed < 0:
        raise InputError(f"--seed {seed}: 0 or more")
    site_sets, work = _prepare(pair, prompts, sites, window, control, engine, batch_size)
    control_model = work.targets.get("control")
    configuration = {
        "command": "patch",
        "base_sha256": pair.base.sha256,
        "unlearned_sha256": pair.unlearned.sha256,
        "control_sha256": control_model.sha256 if control_model else None,
        "data_sha256": prompts.sha256,
        "examples": len(prompts),
        "scoring": prompts.scoring,
        "sites": [site_label(site_set) for site_set in site_sets],
        "window": window,
        "engine": engine,
        "padding_side": padding_side,
        "dtype": pair.base.dtype,
        "device": pair.base.device.type,
        "precision": precision,
        "seed": seed,
    }
    provenance = {
        "command": "patch",
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": control_model.name if control_model else None,
        "data": prompts.source,
    }
    run = _open(out, configuration, provenance, processes)
    if run is not None and run.is_complete:
        return load_result(run.path)
    plan = _plan(
        work,
        batch_size=batch_size,
        padding_side=padding_side,
        max_memory=max_memory,
        chunk_tokens=chunk_tokens or (run.record.get("plan", {}).get("chunk_tokens") if run is not None else None),
        processes=processes,
    )
    if run is not None and processes.rank == 0:
        run.note(plan=plan.record(), processes=processes.count, threads=torch.get_num_threads())
    try:
        with matmul_precision(precision):
            frame, measured = run_sweep(work, plan, run=run, processes=processes, label="patching", progress=progress)
    except BaseException:
        if run is not None and processes.rank == 0:
            run.pause(wall_time_s=clock.seconds)
        raise
    result = PatchingResult(frame, configuration, provenance, clock.seconds, measured)
    if run is not None and processes.rank == 0:
        run.finish(result.frame, result.summary(), wall_time_s=clock.seconds, measured=measured)
        result.wall_time_s = run.record["wall_time_s"]
    processes.wait()
    return result


def plan_patch(
    pair: ModelPair,
    prompts: Prompts,
    *,
    sites: str | Sequence[str] | None = None,
    window: int = 5,
    control: str | Model | None = "auto",
    batch_size: int = 16,
    chunk_tokens: int | None = None,
    max_memory: int | None = None,
    processes: Processes = ALONE,
) -> Plan:
    """What `patch` with these arguments would compute, without computing it.

    Raises:
        InputError: what `patch` raises before it computes.
    """
    _, work = _prepare(pair, prompts, sites, window, control, "wavefront", batch_size)
    return _plan(
        work,
        batch_size=batch_size,
        padding_side="right",
        max_memory=max_memory,
        chunk_tokens=chunk_tokens,
        processes=processes,
    )


def _plan(
    work: Work,
    *,
    batch_size: int,
    padding_side: Literal["left", "right"],
    max_memory: int | None,
    chunk_tokens: int | None,
    processes: Processes,
) -> Plan:
    models = [work.base, *work.targets.values()]
    weights = Streamed(models).least_memory if work.base.streamed is not None else 0
    processes.wait()  # what is free is known when all have loaded
    budget = memory_budget(work.base.device, max_memory, weights_to_come=weights)
    tightest = min(processes.gather([budget]), key=lambda one: one.left)
    # As many batches for one process as for the next, all of one size.
    rounds = -(-len(work.prompts) // (batch_size * processes.count))
    even_size = -(-len(work.prompts) // (rounds * processes.count))
    return processes.once(
        lambda: make_plan(
            models,
            work.prompts,
            work.interventions,
            batches=work.prompts.batches(even_size, padding_side=padding_side),
            budget=tightest,
            chunk_tokens=chunk_tokens,
            processes=processes.count,
        )
    )


def _open(
    out: str | Path | None, configuration: dict[str, Any], provenance: dict[str, Any], processes: Processes
) -> Run | None:
    """The run directory, opened by the first process and then joined by the others."""
    if out is None:
        return None
    run = open_run(out, configuration, provenance) if processes.rank == 0 else None
    processes.wait()
    run = run or open_run(out, configuration, provenance, joins=True)
    processes.wait()  # the first may go on and write only when all have looked
    return run


def _prepare(
    pair: ModelPair,
    prompts: Prompts,
    sites: str | Sequence[str] | None,
    window: int,
    control: str | Model | None,
    engine: str,
    batch_size: int,
) -> tuple[tuple[SiteSet, ...], Work]:
    """Check everything that can be wrong before anything is computed."""
    site_sets = parse_sites(sites) if sites is not None else DEFAULT_SITES
    interventions = sweep(site_sets, centred_windows(pair.n_layers, window))
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: at least 1")
    run_engine = find_engine(engine)
    if engine == "reference" and pair.base.streamed is not None:
        raise InputError("--engine reference needs the models in memory; leave --stream out")
    targets = {"unlearned": pair.unlearned}
    control_model = _resolve_control(pair, control)
    if control_model is not None:
        targets["control"] = control_model
    for model in (pair.base, *targets.values()):
        _check_sites(model, site_sets)
        _check_tokens(model, prompts)
    return site_sets, Work(run_engine, pair.base, targets, prompts, interventions)


def _resolve_control(pair: ModelPair, control: str | Model | None) -> Model | None:
    if control == "auto":
        control = zoo.default_control(pair.base.name)
    if isinstance(control, str):
        streamed = pair.base.streamed is not None
        control = load_model(control, device=str(pair.base.device), dtype=pair.base.dtype, stream=streamed)
    if control is not None:
        check_comparable(pair.base, control)
    return control


def _check_sites(model: Model, site_sets: Sequence[tuple[str, ...]]) -> None:
    for name in dict.fromkeys(name for site_set in site_sets for name in site_set):
        if name in model.missing_sites:
            raise InputError(f"{model.name} has no site {name}: {model.missing_sites[name]}")


def _check_tokens(model: Model, prompts: Prompts) -> None:
    vocabulary = model.hf.config.get_text_config().vocab_size
    for item in prompts.items:
        if len(item.input_ids) > model.context:
            raise InputError(
                f"prompt {item.id} has {len(item.input_ids)} tokens with its answer, and the context of {model.name} "
                f"is {model.context}; shorten or remove it"
            )
        if max(item.input_ids) >= vocabulary:
            raise InputError(
                f"prompt {item.id} has the token {max(item.input_ids)}, and {model.name} has {vocabulary} of them; "
                "the tokenizer is not this model's: copy its own beside the base's weights"
            )
