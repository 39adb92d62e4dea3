"""`dissect plot`: draw the figures of a finished run again."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dissect.cli import options
from dissect.cli.report import figure_formats, note
from unlearning.common.errors import InputError
from unlearning.common.terminal import write_json

EXAMPLES = """\b
Examples:
  dissect plot runs/patch-demo-npo
  dissect plot runs/patch-demo-npo --format html,pdf,svg,png
"""


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a finished run.")],
    formats: options.Formats = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not list the files.")] = False,
    as_json: options.Json = False,
) -> None:
    """Draw the figures of a finished run again, also as pdf, svg or png."""
    wanted = figure_formats(formats)
    exported = _load(run).save_figures(run, formats=wanted)
    if exported.problem:
        note(exported.problem)
    if as_json:
        write_json({"figures": [str(path) for path in exported.paths], "problem": exported.problem})
    elif not quiet:
        sys.stdout.writelines(f"{path}\n" for path in exported.paths)


def _load(run: Path) -> Any:
    """Load the result of a run with the loader of the command that wrote it.

    Returns:
        A result with `save_figures`.

    Raises:
        InputError: The directory holds no run with figures.
    """
    from dissect import load_behave, load_decompose, load_probe, load_result, load_verdict
    from unlearning.common.runs import read_record

    loaders = {
        "patch": load_result,
        "restore": load_result,
        "decompose": load_decompose,
        "probe": load_probe,
        "behave": load_behave,
        "verdict": load_verdict,
    }
    command = read_record(run)["configuration"].get("command")
    if command not in loaders:
        raise InputError(f"{run} holds a run of {command!r}, which has no figures. Name a run of {', '.join(loaders)}.")
    return loaders[command](run)
