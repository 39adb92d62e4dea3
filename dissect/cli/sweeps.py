"""What `dissect patch` and `dissect restore` share: from checked options to a finished run and its report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dissect.cli.loading import (
    ModelOptions,
    PromptOptions,
    earlier_run,
    figure_formats,
    find_data,
    note,
    open_control,
    open_donors,
    open_pair,
    open_prompts,
    short_name,
)
from dissect.runtime.processes import join_processes
from unlearning.common.errors import InputError
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    from dissect.sweeps.result import SweepResult
    from dissect.sweeps.run import Command, Settings


DIRECTIONS = ("base-to-unlearned", "unlearned-to-base")


@dataclass(frozen=True)
class Request:
    """A sweep as it was typed, beside its settings.

    Attributes:
        command: which command.
        base: name of the base model.
        unlearned: name of the unlearned model.
        control: name of the control, `auto` or `none`.
        donor: comma-separated donors.
        data: file of prompts.
        loading: how models are loaded.
        asking: how prompts are read.
        out: run directory.
        formats: comma-separated formats of figures.
        show_prompts: how many prompts to show instead.
        dry_run: whether to show the plan instead.
        as_json: whether the report is JSON.
    """

    command: "Command"
    base: str
    unlearned: str
    control: str
    donor: str
    data: Path | None
    loading: ModelOptions
    asking: PromptOptions
    out: Path | None
    formats: str
    show_prompts: int | None
    dry_run: bool
    as_json: bool


def windows_of(window: str | None, layers: str | None, *, prefix: bool, suffix: bool) -> tuple[int | str, ...] | None:
    """The kinds of windows that the options name, None where they name none.

    Raises:
        InputError: a width or a list of layers that is none.
    """
    from dissect.interventions.windows import window_kinds

    kinds = names_of(window or "")
    kinds += ["prefix"] * prefix + ["suffix"] * suffix + ([f"layers {layers}"] if layers is not None else [])
    return None if not kinds and window is None else window_kinds(kinds)


def run(request: Request, settings: "Settings") -> None:
    """Load, sweep, and report.

    Raises:
        InputError: what is wrong with the models, the prompts or the options.
    """
    if request.show_prompts is not None and request.show_prompts < 1:
        raise InputError(f"--show-prompts {request.show_prompts}: show at least one")
    if settings.chunk_tokens is not None and settings.chunk_tokens < 1:
        raise InputError(f"--chunk-tokens {settings.chunk_tokens}: at least 1")
    formats = figure_formats(request.formats)
    data = find_data(request.data, request.base)
    with join_processes(device=request.loading.device) as processes:
        pair = open_pair(request.base, request.unlearned, request.loading, processes)
        prompts = open_prompts(data, pair, request.asking)
        from dissect.sweeps.run import plan_layer_sweep, run_layer_sweep
        from dissect.sweeps.tables import print_plan, print_prompts

        if request.show_prompts is not None:
            print_prompts(prompts, pair.tokenizer, request.show_prompts)
            return
        settings = replace(
            settings,
            control=open_control(request.control, pair, request.loading),
            donor=open_donors(request.donor, pair, request.loading),
        )
        if request.dry_run:
            plan = plan_layer_sweep(pair, prompts, settings, processes=processes)
            write_json(plan.record()) if request.as_json else print_plan(plan)
            return
        out = request.out or Path("runs") / run_name(request, settings)
        earlier = earlier_run(out)
        quiet = request.loading.quiet
        result = run_layer_sweep(
            request.command, pair, prompts, settings, out=out, progress=not quiet, processes=processes
        )
        if processes.rank > 0:
            return
        if earlier and not quiet:
            note(earlier)
        _report(result, out, formats, quiet=quiet, as_json=request.as_json)


def run_name(request: Request, settings: "Settings") -> str:
    """The directory of a run that was not named: the model, and what is not as by default."""
    parts = [request.command, short_name(request.unlearned)]
    window = settings.window
    for kind in (window,) if isinstance(window, int | str) else window or ():
        parts.append(f"window{kind}" if str(kind).isdigit() else str(kind).replace(" ", ""))
    if settings.direction != "base-to-unlearned":
        parts.append(settings.direction)
    parts += [short_name(name) for name in names_of(request.donor) if name != "base"]
    if settings.null:
        parts.append(f"null{settings.null}")
    if request.asking.scoring != "answer":
        parts.append(request.asking.scoring)
    return "-".join(parts)


def names_of(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _report(result: "SweepResult", out: Path, formats: Sequence[str], *, quiet: bool, as_json: bool) -> None:
    from dissect.sweeps.tables import console, print_peaks

    exported = result.save_figures(out, formats=formats)
    if exported.problem:
        note(exported.problem)
    for _, row in result.undefined().iterrows():
        note(f"{row['examples']} examples have no KRS in the {row['arm']} arm: {row['undefined']}")
    if as_json:
        write_json({**result.summary(), "run": str(out), "figures": [str(path) for path in exported.paths]})
    elif not quiet:
        print_peaks(result)
        console().print(f"figure  {out / 'figures' / 'krs.html'}", soft_wrap=True, highlight=False)
        console().print(f"run     {out}", soft_wrap=True, highlight=False)
