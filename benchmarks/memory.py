"""`python -m benchmarks.memory`: a pair larger than memory, swept with one layer of each model in memory."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.report import JsonOption, ThreadsOption, check_target, describe_machine, set_threads, write_record
from benchmarks.shapes import Shape, find_shape
from unlearning.common.errors import InputError
from unlearning.common.terminal import run_app

if TYPE_CHECKING:
    from benchmarks.child import Finished
    from benchmarks.pair_files import PairFiles

SHAPES = ("7b", "1b", "compute", "small", "tiny")

_EXAMPLES = """\b
Examples:
  python -m benchmarks.memory --shape 7b --stream --disk /scratch
  python -m benchmarks.memory --shape 1b --stream --remove
  python -m benchmarks.memory --shape tiny --json -
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    shape: Annotated[str, typer.Option(help=f"Of the models: {', '.join(SHAPES)}; 7b takes 27 GB of disk.")] = "1b",
    stream: Annotated[bool, typer.Option("--stream", help="Hold one layer of each model in memory at a time.")] = False,
    disk: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the pair, which is written once.")] = Path(
        "runs/memory"
    ),
    keep: Annotated[bool, typer.Option("--keep/--remove", help="Keep the pair's files after the run.")] = True,
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens of each prompt, its answer included.")] = 24,
    answer: Annotated[int, typer.Option(help="Tokens of the answer.")] = 4,
    window: Annotated[int, typer.Option(help="Layers patched together.")] = 5,
    threads: ThreadsOption = None,
    json_to: JsonOption = None,
) -> None:
    """Write a random bfloat16 pair, sweep patches over it in a process of its own, and report what that took."""
    asked = check_shape(shape, prompts=prompts, tokens=tokens, answer=answer)
    check_target(json_to)
    set_threads(threads)

    from benchmarks.child import run_patch

    files = write_files(asked, disk / asked.name)
    try:
        arguments = patch_arguments(files, asked, window=window, stream=stream)
        finished = run_patch(arguments, fresh(files.folder / "run"), threads=threads)
        record = report(asked, files, finished, stream=stream, window=window)
    finally:
        if not keep:
            files.remove()
    _show(record, json_to)


def check_shape(name: str, *, prompts: int, tokens: int, answer: int) -> Shape:
    """Return a shape with other prompts.

    Args:
        name: The shape.
        prompts: Number of prompts.
        tokens: Tokens of each prompt, its answer included.
        answer: Tokens of its answer.

    Returns:
        The shape with these prompts.

    Raises:
        InputError: The shape is unknown, there is no prompt or no answer token, or the answer fills the prompt.
    """
    found = find_shape(name, SHAPES)
    if prompts < 1 or answer < 1 or tokens <= answer:
        raise InputError(
            f"--prompts {prompts} --tokens {tokens} --answer {answer}: at least one prompt, one answer token, and more "
            "tokens than the answer's"
        )
    return replace(found, prompts=prompts, tokens=tokens, answer=answer)


def write_files(shape: Shape, folder: Path) -> "PairFiles":
    """Write pair and questions, with a progress bar."""
    from benchmarks.pair_files import tensor_sizes, write_pair, write_questions
    from unlearning.common.progress import Progress

    mebibytes = 2 * sum(size.numel() for size in tensor_sizes(shape).values()) * 2 // 2**20
    with Progress(mebibytes, "writing MiB") as bar:
        files = write_pair(shape, folder, advance=lambda size: bar.advance(size // 2**20))
    write_questions(files.folder / "questions.jsonl", shape)
    return files


def patch_arguments(files: "PairFiles", shape: Shape, *, window: int, stream: bool) -> list[str]:
    """Return the arguments of `dissect patch`."""
    arguments = ["--base", str(files.base), "--unlearned", str(files.unlearned), "--control", "none"]
    arguments += ["--data", str(files.folder / "questions.jsonl"), "--batch-size", str(shape.prompts)]
    arguments += ["--window", str(window), "--quiet", "--json"]
    return [*arguments, "--stream"] if stream else arguments


def fresh(out: Path) -> Path:
    """Remove a directory if it exists, and return its path."""
    if out.exists():
        shutil.rmtree(out)
    return out


def report(shape: Shape, files: "PairFiles", finished: "Finished", *, stream: bool, window: int) -> dict[str, Any]:
    """Return what the sweep took, in bytes, seconds and operations."""
    import torch

    from benchmarks.flops import naive_sweep_flops
    from benchmarks.gemm import GemmProbe
    from benchmarks.models import build_config

    config = build_config(shape)
    gemm = GemmProbe(config, device=torch.device("cpu"), dtype=torch.float32)
    gemm.measure()
    flops = (finished.record.get("plan") or {}).get("flops")
    seconds = finished.record["wall_time_s"]
    return {
        "case": shape.description,
        "stream": stream,
        "window": window,
        **describe_machine(torch.device("cpu")),
        "weight_bytes_of_both": 2 * files.weight_bytes,
        "peak_resident_bytes": finished.peak_bytes,
        "bytes_read": finished.record.get("bytes_read"),
        "sweep_seconds": seconds,
        "process_seconds": finished.seconds,
        "gemm_peak_flops_per_second": gemm.peak,
        "planned_flops": flops,
        "naive_flops": naive_sweep_flops(
            config, rows=shape.prompts, positions=shape.tokens, interventions=3 * shape.n_layers
        ),
        "gemm_share": None if flops is None else flops / seconds / gemm.peak,
        "run_record": finished.record,
    }


def _show(record: dict[str, Any], json_to: str | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    write_record(record, json_to)
    both, read, share = (record[key] for key in ("weight_bytes_of_both", "bytes_read", "gemm_share"))
    rows = {
        "weights of both models on disk": f"{both / 2**30:.2f} GiB",
        "peak resident memory": f"{record['peak_resident_bytes'] / 2**30:.2f} GiB",
        "read of weights": f"{read / 2**30:.2f} GiB ({read / both:.3f} times both models)" if read else "loaded whole",
        "the sweep": f"{record['sweep_seconds']:.1f} s",
        "the process, loading and all": f"{record['process_seconds']:.1f} s",
        "operations": "-" if share is None else f"{record['planned_flops'] / 1e12:.3g} TFLOP",
        "naive operations": f"{record['naive_flops'] / 1e12:.3g} TFLOP",
        "share of GEMM peak": "-" if share is None else f"{100 * share:.0f} %",
        "GEMM peak": f"{record['gemm_peak_flops_per_second'] / 1e9:.0f} GFLOP/s, {record['threads']} threads",
    }
    table = Table(box=SIMPLE, title=record["case"], title_justify="left", show_header=False)
    for what, value in rows.items():
        table.add_row(what, value)
    Console(stderr=json_to == "-").print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    interrupted = "what was written of the pair is written again by the same command"
    run_app(app, "python -m benchmarks.memory", arguments, interrupted=interrupted)


if __name__ == "__main__":
    main()
