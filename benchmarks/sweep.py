"""`python -m benchmarks.sweep`: the paper's four sweeps, ours and what a user would pick instead, side by side."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.report import JsonOption, ThreadsOption, check_target, describe_machine, set_threads, write_record
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.account import Part
    from benchmarks.race import Race

SHAPES = ("compute", "small", "demo", "1b", "tiny")

_EXAMPLES = """\b
Examples:
  python -m benchmarks.sweep --shape compute --json runs/compute.json
  python -m benchmarks.sweep --shape small --against notebook,transformer_lens --repeats 5
  python -m benchmarks.sweep --shape compute --against notebook --account
  python -m benchmarks.sweep --shape 1b --device cuda --dtype bfloat16
  python -m benchmarks.sweep --quick --json -
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    shape: Annotated[str, typer.Option(help=f"Model and prompts: {', '.join(SHAPES)}.")] = "compute",
    against: Annotated[
        str, typer.Option(metavar="LIST", help="Contestants; this toolkit's wavefront is always included.")
    ] = ("notebook,transformer_lens,nnsight,reference"),
    repeats: Annotated[int, typer.Option(help="Timed rounds; times are medians over them.")] = 3,
    threads: ThreadsOption = None,
    device: Annotated[str, typer.Option(help="Device, such as cpu or cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 on a GPU.")] = "float32",
    with_account: Annotated[
        bool,
        typer.Option("--account", help="Sweep twice more and report where the time of this toolkit goes (CPU only)."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run one round of the tiny shape, to see that it works.")
    ] = False,
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
    if with_account and device != "cpu":
        raise InputError(f"--account --device {device}: a GPU's operations run on after they return; use --device cpu")
    check_target(json_to)
    set_threads(threads)
    contestants = parse_contestants(against)
    absent = {item.name: item.install_command for item in contestants if not item.is_installed}

    from benchmarks.account import account
    from benchmarks.case import build_case
    from benchmarks.gemm import GemmProbe
    from benchmarks.race import as_record, race
    from dissect.models.model import resolve_device, resolve_dtype
    from unlearning.common.progress import Progress

    found_device = resolve_device(device)
    found_dtype = resolve_dtype(dtype, found_device)
    case = build_case(shape, device=found_device, dtype=found_dtype, among=SHAPES)
    present = [item for item in contestants if item.is_installed]
    gemm = GemmProbe(case.config, device=found_device, dtype=found_dtype)
    with Progress(len(present) * (1 + repeats), "sweeping") as bar:
        result = race(case, present, repeats=repeats, gemm=gemm, advance=lambda: bar.advance(1))
    machine = describe_machine(found_device)
    settings = {"shape": shape, "dtype": dtype, "repeats": repeats, **machine}
    parts = account(partial(result.entries[0].run, case.batches)) if with_account else []
    record = {**settings, **as_record(result), "not_installed": absent, "account": [vars(part) for part in parts]}
    write_record(record, json_to)
    _show(result, settings, absent, parts, to_stderr=json_to == "-")


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
        seconds = sorted(entry.times)
        found.add_row(
            entry.contestant.name,
            f"{entry.seconds:.3g}",
            f"{seconds[0]:.3g}-{seconds[-1]:.3g}",
            f"{result.ratio(entry):.2f}",
            f"{entry.flops / 1e12:.3g}",
            f"{100 * entry.gemm_share:.0f}",
            f"{entry.memory_bytes / 2**20:.0f}",
        )
    return found


def account_table(parts: Sequence["Part"], peak: float) -> "Table":
    """Seconds, shares of all of them, and rates."""
    from rich.box import SIMPLE
    from rich.table import Table

    found = Table(box=SIMPLE, title="ours, operation by operation", title_justify="left", padding=(0, 1, 0, 0))
    found.add_column("where the time goes", no_wrap=True)
    for heading in ("seconds", "% of all", "TFLOP", "% of peak"):
        found.add_column(heading, justify="right", no_wrap=True)
    total = sum(part.seconds for part in parts)
    for part in parts:
        rate = f"{100 * part.flops / part.seconds / peak:.0f}" if part.flops else ""
        flops = f"{part.flops / 1e12:.3g}" if part.flops else ""
        found.add_row(part.kind, f"{part.seconds:.3g}", f"{100 * part.seconds / total:.1f}", flops, rate)
    return found


def _show(
    result: "Race", settings: dict[str, Any], absent: dict[str, str], parts: Sequence["Part"], *, to_stderr: bool
) -> None:
    from rich.console import Console

    console = Console(stderr=to_stderr)
    console.print(table(result, settings))
    if parts:
        console.print(account_table(parts, result.gemm.peak))
    lines = [
        f"{settings['processor']}, {settings['threads']} threads; medians of {settings['repeats']}, interleaved; "
        "memory of the sweep before them, above that at its start.",
        "Peak is this machine's best product of the model's shapes before and after each sweep; over all "
        f"{result.gemm.peak / 1e9:.0f} GFLOP/s, {result.gemm.best}.",
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
