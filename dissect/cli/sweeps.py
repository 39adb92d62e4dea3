"""Shared by `dissect patch` and `dissect restore`: run a layer sweep and report it."""

from pathlib import Path
from typing import TYPE_CHECKING

from dissect.cli.loading import (
    choose_reading,
    find_data,
    open_control,
    open_donors,
    open_pair,
    open_prompts,
    short_name,
    split_names,
)
from dissect.cli.options import ModelOptions, OutputOptions, PairOptions, PromptOptions, SweepOptions
from dissect.cli.report import earlier_run, figure_formats, report
from dissect.runtime.processes import join_processes
from unlearning.common.terminal import write_json

if TYPE_CHECKING:
    from dissect.models.sites import SiteSet
    from dissect.sweeps.run import Command


def run_sweep(
    command: "Command",
    sites: "tuple[SiteSet, ...]",
    data: Path | None,
    *,
    pair: PairOptions,
    sweep: SweepOptions,
    prompts: PromptOptions,
    models: ModelOptions,
    output: OutputOptions,
) -> None:
    """Load models and prompts, run the sweep and report it; or show the prompts or the plan.

    Args:
        command: `patch` or `restore`.
        sites: Sites of the interventions.
        data: File of forget prompts; None for a built-in pair's own.
        pair: Names of the models.
        sweep: Windows, donors and how to compute.
        prompts: How to read the prompts.
        models: How to load the models.
        output: Where the results go.
    """
    from dissect.runtime.sizes import parse_bytes
    from dissect.sweeps.run import Settings, plan_layer_sweep, run_layer_sweep

    formats = figure_formats(output.formats)
    windows = window_kinds_of(sweep)
    max_memory = None if sweep.max_memory is None else parse_bytes(sweep.max_memory)
    data = find_data(data, pair.base)
    reading = choose_reading(prompts, pair, quiet=output.quiet, scoring=sweep.scoring)
    with join_processes(device=models.device) as processes:
        opened = open_pair(pair, models, processes, quiet=output.quiet, stream=sweep.stream, max_memory=max_memory)
        asked = open_prompts(
            data,
            opened,
            reading,
            scoring=sweep.scoring,  # type: ignore[arg-type]
            max_new_tokens=sweep.max_new_tokens,
        )
        from dissect.sweeps.tables import print_peaks, print_plan, print_prompts

        if sweep.show_prompts is not None:
            print_prompts(asked, opened.tokenizer, sweep.show_prompts)
            return
        settings = Settings(
            sites=sites,
            window=windows,
            control=open_control(pair.control, opened, models, quiet=output.quiet, align=pair.align),
            direction=sweep.direction,  # type: ignore[arg-type]
            donor=open_donors(sweep.donor, opened, models, quiet=output.quiet, align=pair.align),
            null=sweep.null,
            engine=sweep.engine,
            batch_size=sweep.batch_size,
            chunk_tokens=sweep.chunk_tokens,
            max_memory=max_memory,
            precision=sweep.precision,  # type: ignore[arg-type]
            seed=sweep.seed,
        )
        if sweep.dry_run:
            plan = plan_layer_sweep(opened, asked, settings, processes=processes)
            write_json(plan.record()) if output.as_json else print_plan(plan)
            return
        out = output.out or Path("runs") / run_name(command, pair.unlearned, sweep)
        earlier = earlier_run(out)
        result = run_layer_sweep(
            command, opened, asked, settings, out=out, progress=not output.quiet, processes=processes
        )
        if processes.rank > 0:
            return
        notes = [
            f"{row['examples']} examples have no KRS in the {row['arm']} arm: {row['undefined']}"
            for _, row in result.undefined().iterrows()
        ]
        page = ("figure", "figures/krs.html")
        report(result, out, formats, output, print_tables=print_peaks, page=page, earlier=earlier, notes=notes)


def window_kinds_of(sweep: SweepOptions) -> tuple[int | str, ...] | None:
    """Return the kinds of windows that the options name, or None if they name none.

    Returns:
        Widths and names of window kinds.

    Raises:
        InputError: A width or a list of layers is wrong.
    """
    from dissect.interventions.windows import window_kinds

    kinds = split_names(sweep.window or "")
    kinds += ["prefix"] * sweep.prefix + ["suffix"] * sweep.suffix
    kinds += [f"layers {sweep.layers}"] if sweep.layers is not None else []
    return None if not kinds and sweep.window is None else window_kinds(kinds)


def run_name(command: str, unlearned: str, sweep: SweepOptions) -> str:
    """Return the name of the default run directory: command, model and the options that differ from their defaults.

    Args:
        command: `patch` or `restore`.
        unlearned: Name of the unlearned model.
        sweep: Options of the sweep.

    Returns:
        A name such as `patch-demo-npo-window5`.
    """
    parts = [command, short_name(unlearned)]
    for kind in window_kinds_of(sweep) or ():
        parts.append(f"window{kind}" if str(kind).isdigit() else str(kind).replace(" ", ""))
    if sweep.direction != "base-to-unlearned":
        parts.append(sweep.direction)
    parts += [short_name(name) for name in split_names(sweep.donor) if name != "base"]
    parts += [f"null{sweep.null}"] if sweep.null else []
    parts += [sweep.scoring] if sweep.scoring != "answer" else []
    return "-".join(parts)
