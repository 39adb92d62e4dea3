"""The sweep that `patch` and `restore` share: checks, arms, plan, run directory."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dissect.engine import find_engine
from dissect.engine.layers import Streamed
from dissect.engine.plan import Plan, combined_plan, make_plan
from dissect.interventions.arms import Direction, make_arm_groups, resolve_donors
from dissect.interventions.intervention import sweep
from dissect.interventions.windows import parse_windows
from dissect.models.alignment import check_basis
from dissect.models.model import Model
from dissect.models.pair import ModelPair, resolve_control
from dissect.models.sites import SITES, SiteSet, is_regex, is_weight, regex_of, site_label
from dissect.models.weights import Location
from dissect.prompts.prompts import Prompts, check_fits, check_loaded
from dissect.runtime.memory import memory_budget
from dissect.runtime.precision import Precision, matmul_precision
from dissect.runtime.processes import ALONE, Processes
from dissect.sweeps.passes import Work, run_sweep
from dissect.sweeps.result import SweepResult, load_result
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.patterns import searcher
from unlearning.common.runs import Run, computing, open_run

Command = Literal["patch", "restore"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """The arguments of `dissect.patch` other than models, prompts and output."""

    sites: tuple[SiteSet, ...]
    window: int | str | Sequence[int | str] | None = None
    control: str | Model | None = "auto"
    direction: Direction = "base-to-unlearned"
    donor: str | Model | Sequence[str | Model] = "base"
    null: int = 0
    engine: str = "wavefront"
    batch_size: int = 16
    chunk_tokens: int | None = None
    max_memory: int | None = None
    precision: Precision = "highest"
    padding_side: Literal["left", "right"] = "right"
    seed: int = 0


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A sweep whose input has been checked."""

    work: Work
    control: Model | None
    donors: list[str | Model]


def run_layer_sweep(
    command: Command,
    pair: ModelPair,
    prompts: Prompts,
    settings: Settings,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> SweepResult:
    """Run a sweep, or load it if its run directory already holds it.

    Args:
        command: The name of the sweep.
        pair: The base and the unlearned model.
        prompts: The prompts.
        settings: The sweep's settings; see `dissect.patch`.
        out: Run directory, if any.
        progress: Show a progress bar.
        processes: The processes that share the work.

    Returns:
        The whole result, in every process.

    Raises:
        InputError: See `dissect.patch`.
    """
    prepared = _prepare(pair, prompts, settings)
    configuration, provenance = _record(command, pair, prompts, settings, prepared)
    run = _open(out, configuration, provenance, processes)
    if run is not None and run.is_complete:
        return load_result(run.path)
    known = run.record.get("plan", {}).get("chunk_tokens") if run is not None else None
    mine = run if processes.rank == 0 else None  # one process keeps the record
    with computing(mine) as clock:
        plans = _plans(pair, prepared.work, settings, processes, chunk_tokens=settings.chunk_tokens or known)
        if mine is not None:
            mine.note(plan=combined_plan(plans).record(), processes=processes.count, threads=torch.get_num_threads())
        label = "patching" if command == "patch" else "restoring"
        with matmul_precision(settings.precision):
            frame, measured = run_sweep(
                prepared.work, plans, run=run, processes=processes, label=label, progress=progress
            )
    result = SweepResult(
        frame=frame,
        configuration=configuration,
        provenance=provenance,
        wall_time_s=clock.seconds,
        measured=measured,
    )
    if mine is not None:
        result.write(mine)
    processes.wait()
    return result


def plan_layer_sweep(pair: ModelPair, prompts: Prompts, settings: Settings, *, processes: Processes = ALONE) -> Plan:
    """Plan a sweep without running it.

    Args:
        pair: The base and the unlearned model.
        prompts: The prompts.
        settings: The sweep's settings; see `dissect.patch`.
        processes: The processes that share the work.

    Returns:
        Passes, operations and memory of the sweep.

    Raises:
        InputError: The input is wrong; see `dissect.patch`.
    """
    work = _prepare(pair, prompts, settings).work
    return combined_plan(_plans(pair, work, settings, processes, chunk_tokens=settings.chunk_tokens))


def _record(
    command: Command, pair: ModelPair, prompts: Prompts, settings: Settings, prepared: _Prepared
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the numbers depend on, and the names of models and data."""
    control = prepared.control
    configuration = {
        "command": command,
        "base_sha256": pair.base.sha256,
        "unlearned_sha256": pair.unlearned.sha256,
        "control_sha256": control.sha256 if control else None,
        "data_sha256": prompts.sha256,
        "examples": len(prompts),
        "scoring": prompts.scoring,
        "sites": [site_label(site_set) for site_set in settings.sites],
        "windows": list(dict.fromkeys(window.kind for window in parse_windows(settings.window, pair.n_layers))),
        "direction": settings.direction,
        "donors": [one.sha256 if isinstance(one, Model) else one for one in prepared.donors],
        "null": settings.null,
        "engine": settings.engine,
        "padding_side": settings.padding_side,
        "dtype": pair.base.dtype,
        "device": pair.base.device.type,
        "precision": settings.precision,
        "seed": settings.seed,
    }
    provenance = {
        "command": command,
        "base": pair.base.name,
        "unlearned": pair.unlearned.name,
        "control": control.name if control else None,
        "donors": [one.name if isinstance(one, Model) else one for one in prepared.donors],
        "data": prompts.source,
    }
    return configuration, provenance


def _prepare(pair: ModelPair, prompts: Prompts, settings: Settings) -> _Prepared:
    """Check the whole input before anything is computed."""
    check_at_least("seed", settings.seed, 0)
    check_at_least("batch_size", settings.batch_size, 1)
    check_loaded(prompts, "prompts")
    windows = parse_windows(settings.window, pair.n_layers)
    run_engine = find_engine(settings.engine)
    if settings.engine == "reference" and pair.base.streamed is not None:
        raise InputError("`engine` reference needs the models in memory; turn `stream` off")
    control = resolve_control(pair, settings.control)
    donors = resolve_donors(pair, settings.donor)
    for model in (pair.base, pair.unlearned, control, *donors):
        if isinstance(model, Model):
            _check_sites(model, settings.sites)
            check_fits(model, prompts)
    for one in donors:
        weights = [site for site_set in settings.sites for site in site_set if is_weight(site)]
        if isinstance(one, str) and weights:
            raise InputError(
                f"`donor` must be a model to restore {weights[0]}, got {one}, which gives activations only"
            )
    arm_groups = make_arm_groups(
        pair,
        prompts,
        control=control,
        direction=settings.direction,
        donor=donors,
        null=settings.null,
        seed=settings.seed,
    )
    for model in (pair.unlearned, control, *donors):
        if isinstance(model, Model):
            check_basis(pair.base, model)  # models of one shape, as the arms have found
    restores = any(is_weight(site) for site_set in settings.sites for site in site_set)
    interventions = sweep(settings.sites, windows, pair.base.weights if restores else None)
    return _Prepared(Work(run_engine, arm_groups, prompts, interventions), control, donors)


def _plans(
    pair: ModelPair, work: Work, settings: Settings, processes: Processes, *, chunk_tokens: int | None
) -> list[Plan]:
    """Return one plan per group of arms, all with the same chunk."""
    weights = 0
    if pair.base.streamed is not None:
        weights = max(Streamed(group.load_models().models).min_weight_bytes for group in work.arm_groups)
    elif settings.null:
        weights = sum(p.numel() * p.element_size() for p in pair.base.hf.parameters())
    processes.wait()  # free memory is known once all processes have loaded their models
    budget = memory_budget(pair.base.device, settings.max_memory, weights_to_come=weights)
    tightest = min(processes.gather([budget]), key=lambda one: one.left)
    # Every process gets the same number of batches, all of the same size.
    rounds = -(-len(work.prompts) // (settings.batch_size * processes.count))
    even_size = -(-len(work.prompts) // (rounds * processes.count))
    batches = work.prompts.batches(even_size, padding_side=settings.padding_side)
    known: dict[tuple[int, int], Plan] = {}
    plans = []
    for group in work.arm_groups:
        shape = (len(group.arms), group.n_sources)
        if shape not in known:
            first = next(iter(known.values()), None)
            known[shape] = processes.once(
                lambda shape=shape, first=first: make_plan(  # type: ignore[misc]
                    [pair.base] * (1 + shape[0]),
                    work.interventions,
                    batches=batches,
                    budget=tightest,
                    chunk_tokens=first.chunk_tokens if first is not None else chunk_tokens,
                    processes=processes.count,
                    n_sources=shape[1],
                )
            )
        plans.append(known[shape])
    return plans


def _open(
    out: str | Path | None, configuration: dict[str, Any], provenance: dict[str, Any], processes: Processes
) -> Run | None:
    """Open the run directory in the first process, and join it in the others."""
    if out is None:
        return None
    run = open_run(out, configuration, provenance) if processes.rank == 0 else None
    processes.wait()
    run = run or open_run(out, configuration, provenance, joins=True)
    processes.wait()  # the first process may write only after all have read the record
    return run


def check_regex(text: str) -> SiteSet:
    """Return a regular expression over parameter names as a set of sites.

    Returns:
        One site, the expression between slashes.

    Raises:
        InputError: The expression is broken or empty.
    """
    searcher("parameters", text)
    if not text:
        raise InputError("`parameters` must not be empty; give an expression such as 'mlp\\.down_proj'")
    return (f"/{text}/",)


def _check_sites(model: Model, site_sets: Sequence[SiteSet]) -> None:
    for name in dict.fromkeys(name for site_set in site_sets for name in site_set):
        if name in model.missing_sites:
            raise InputError(f"{model.name} has no site {name}: {model.missing_sites[name]}")
        locations: list[Location] = [*range(model.n_layers), "before", "after"]
        if name in SITES or any(model.weights.at([name], location) for location in locations):
            continue
        if is_regex(name):
            raise InputError(_no_match(regex_of(name), model))
        raise InputError(f"{model.name} has no {name}: its blocks ({type(model.hf).__name__}) have no such weights")


def _no_match(text: str, model: Model) -> str:
    plain = re.sub(r"\\(.)", r"\1", text).strip("^$.*")
    near = difflib.get_close_matches(plain, model.weights.all_names, n=3, cutoff=0.3)
    near = near or list(model.weights.all_names[:3])
    return f"`parameters` {text} matches no parameter of {model.name}; the nearest names are {', '.join(near)}"
