"""`python -m benchmarks.training`: seconds and memory of an optimizer step, ours against a second model in memory."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.report import JsonOption, ThreadsOption, check_target, describe_machine, set_threads, write_record
from benchmarks.training_options import METHODS, parse_methods
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.training_race import Race

SHAPES = ("wide", "deep", "tiny", "1b")

_EXAMPLES = """\b
Examples:
  python -m benchmarks.training --shape wide --json runs/training-wide.json
  python -m benchmarks.training --shape deep --methods finetune,npo_nll,npo_kl --repeats 5
  python -m benchmarks.training --shape 1b --device cuda
  python -m benchmarks.training --model ./SmolLM2-135M-Instruct --methods finetune,npo_nll
  python -m benchmarks.training --quick --json -
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    shape: Annotated[str, typer.Option(help=f"Model and steps: {', '.join(SHAPES)}.")] = "wide",
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Checkpoint to train in place of a random model.")
    ] = None,
    methods: Annotated[str, typer.Option(metavar="LIST", help="Methods to train.")] = ",".join(METHODS),
    repeats: Annotated[int, typer.Option(help="Timed runs of each; times are medians over them.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run; the first is not timed.")] = 4,
    threads: ThreadsOption = None,
    device: Annotated[str, typer.Option(help="Device, such as cpu or cuda:1.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="Run one round of the tiny shape, to see that it works.")
    ] = False,
    json_to: JsonOption = None,
) -> None:
    """Time optimizer steps of the toolkit and of a straightforward trainer, interleaved in one process.

    Both train the same random model, or the same checkpoint, on the same random examples of TOFU's lengths in the same
    order, and their losses must agree. The straightforward trainer keeps a frozen second model where the method has a
    reference, runs it at every step, computes logits at every position, and pads batches as they come. Timed is all
    between the ends of two optimizer steps; what a run does before its first step is measured apart.
    """
    if quick:
        shape, repeats, steps = "tiny", 1, 3
    elif repeats < 3:
        raise InputError(f"--repeats {repeats}: a median needs at least 3; --quick runs one round of a tiny shape")
    if steps < 2:
        raise InputError(f"--steps {steps}: at least 2, since the first is not timed")
    if shape not in SHAPES:
        raise InputError(f"--shape {shape}: unknown; there are {', '.join(SHAPES)}")
    chosen = parse_methods(methods)
    check_target(json_to)
    set_threads(threads)

    from benchmarks.training_case import TrainingCase, checkpoint_shape, find_shape
    from benchmarks.training_race import SIDES, as_record, race
    from dissect.models.model import resolve_device
    from unlearning.common.progress import Progress

    case = TrainingCase(checkpoint_shape(model) if model else find_shape(shape), steps, resolve_device(device))
    with Progress(len(chosen) * len(SIDES) * (1 + repeats), "training") as bar:
        result = race(case, chosen, repeats=repeats, advance=lambda: bar.advance(1))
    settings = {"shape": case.shape.name, "repeats": repeats, **describe_machine(case.device)}
    write_record({**settings, **as_record(result)}, json_to)
    _show(result, settings, to_stderr=json_to == "-")


def table(result: "Race") -> "Table":
    """Times, ratios and memory of every method."""
    from rich.box import SIMPLE
    from rich.table import Table

    found = Table(box=SIMPLE, title=result.case.shape.description, title_justify="left", padding=(0, 1, 0, 0))
    found.add_column("method", no_wrap=True)
    for heading in ("ours s", "plain s", "ratio", "MiB", "plain MiB", "x finetune", "before s"):
        found.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(entry.method.name for entry in result.entries):
        ours, plain = result.entry("ours", name), result.entry("plain", name)
        assert ours and plain
        ratio = result.memory_ratio(name)
        found.add_row(
            name,
            f"{ours.median:.3g}",
            f"{plain.median:.3g}",
            f"{result.speedup(name):.2f}",
            f"{ours.memory_bytes / 2**20:.0f}",
            f"{plain.memory_bytes / 2**20:.0f}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{ours.setup_median:.3g}",
        )
    return found


def _show(result: "Race", settings: dict[str, Any], *, to_stderr: bool) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    console.print(table(result))
    lines = [
        f"{settings['processor']}, {settings['threads']} threads; seconds of an optimizer step, medians of "
        f"{settings['repeats']} runs, interleaved; ratio: plain over ours. Memory of the run before them, model and "
        "all; x finetune: ours over the plain finetune's.",
        "before: what ours does ahead of its first step (constants of the reference model, its first evaluation).",
        f"Losses of every step agree to {result.difference:.1e}.",
    ]
    if result.case.device.type == "cpu":
        names = dict.fromkeys(entry.method.name for entry in result.entries)
        shares = ", ".join(f"{name} {result.cpu_speedup(name):.2f}" for name in names)
        lines.append(f"Ratios of the time on the cores, which other processes hardly change: {shares}.")
    ratio = result.bilevel_ratio()
    if ratio is not None:
        lines.append(
            f"BLUR takes {ratio:.2f} of grad_diff's step plus {result.projection_seconds:.2g} s of projection."
        )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input or disagreeing sides with one line, 130 on Ctrl-C."""
    run_app(app, "python -m benchmarks.training", arguments, interrupted="nothing was written")


if __name__ == "__main__":
    main()
