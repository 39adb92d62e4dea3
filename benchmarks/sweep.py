"""`python -m benchmarks.sweep`: the paper's four sweeps, ours and what a user would pick instead, side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.report import JsonOption, ThreadsOption, check_target, describe_machine, set_threads, write_record
from unlearning.errors import InputError
from unlearning.terminal import run_app

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.race import Race

SHAPES = ("compute", "small", "demo", "1b", "tiny")

_EXAMPLES = """\b
Examples:
  python -m benchmarks.sweep --shape compute --json runs/compute.json
  python -m benchmarks.sweep --shape small --against notebook,transformer_lens --repeats 5
  python -m benchmarks.sweep --shape 1b --device cuda --dtype bfloat16
  python -m benchmarks.sweep --quick --json -
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    shape: Annotated[str, typer.Option(help=f"Model and prompts: {', '.join(SHAPES)}.")] = "compute",
    against: Annotated[str, typer.Option(metavar="LIST", help="Contestants; wavefront, ours, is always there.")] = (
        "notebook,transformer_lens,nnsight,reference"
    ),
    repeats: Annotated[int, typer.Option(help="Timed rounds; times are medians over them.")] = 3,
    threads: ThreadsOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32; on a GPU also bfloat16.")] = "float32",
    quick: Annotated[bool, typer.Option("--quick", help="One round of the tiny shape: does it run at all?")] = False,
    json_to: JsonOption = None,
) -> None:
    """Time the layer sweeps of every contestant, interleaved in one process, on the same models and prompts.

    Timed is all that a user waits for once the models are loaded; the first sweep of each is not timed, and of ours it
    holds the calibration of the chunk size.
    """
    from benchmarks.contestants import parse_contestants

    if quick:
        shape, repeats = "tiny", 1
    elif repeats < 3:
        raise InputError(f"--repeats {repeats}: a median needs at least 3; --quick runs one round of a tiny shape")
    check_target(json_to)
    set_threads(threads)
    contestants = parse_contestants(against)
    absent = {item.name: item.install_command for item in contestants if not item.is_installed}

    from benchmarks.case import build_case
    from benchmarks.gemm import GemmProbe
    from benchmarks.race import as_record, race
    from dissect.pairs import resolve_device, resolve_dtype
    from dissect.progress import Progress

    found_device = resolve_device(device)
    found_dtype = resolve_dtype(dtype, found_device)
    case = build_case(shape, device=found_device, dtype=found_dtype, among=SHAPES)
    present = [item for item in contestants if item.is_installed]
    gemm = GemmProbe(case.config, device=found_device, dtype=found_dtype)
    with Progress(len(present) + repeats * (len(present) + 1), "sweeping") as bar:
        result = race(case, present, repeats=repeats, gemm=gemm, advance=lambda: bar.advance(1))
    machine = describe_machine(found_device)
    settings = {"shape": shape, "dtype": dtype, "repeats": repeats, **machine}
    write_record({**settings, **as_record(result), "not_installed": absent}, json_to)
    _show(result, settings, absent, to_stderr=json_to == "-")


def table(result: "Race", settings: dict[str, Any]) -> "Table":
    """Times, ratios, shares of peak and memory."""
    from rich.box import SIMPLE
    from rich.table import Table

    title = f"{result.case.description}\n{len(result.case.interventions)} interventions, {settings['dtype']}"
    found = Table(box=SIMPLE, title=title, title_justify="left", padding=(0, 1, 0, 0))
    found.add_column("contestant", no_wrap=True)
    for heading in ("seconds", "range", "x ours", "TFLOP", "% of peak", "MiB"):
        found.add_column(heading, justify="right", no_wrap=True)
    for entry in result.entries:
        seconds = sorted(run.seconds for run in entry.timed)
        found.add_row(
            entry.contestant.name,
            f"{entry.seconds:.3g}",
            f"{seconds[0]:.3g}-{seconds[-1]:.3g}",
            f"{result.ratio(entry):.2f}",
            f"{entry.flops / 1e12:.3g}",
            f"{100 * result.gemm_share(entry):.0f}",
            f"{entry.memory_bytes / 2**20:.0f}",
        )
    return found


def _show(result: "Race", settings: dict[str, Any], absent: dict[str, str], *, to_stderr: bool) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    console.print(table(result, settings))
    lines = [
        f"{settings['processor']}, {settings['threads']} threads; medians of {settings['repeats']}, interleaved; "
        "memory above that at the start of the sweep.",
        f"Peak is this machine's best product of the model's shapes: {result.gemm.peak / 1e9:.0f} GFLOP/s, "
        f"{result.gemm.best}.",
        f"KRS agree to {result.difference:.1e} ({' and '.join(result.apart)}).",
        *(f"{name} is not installed: {command}" for name, command in absent.items()),
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input or disagreeing contestants with one line, 130 on Ctrl-C."""
    run_app(app, "python -m benchmarks.sweep", arguments, interrupted="nothing was written")


if __name__ == "__main__":
    main()
