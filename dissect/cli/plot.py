"""`dissect plot`: the figures of a finished run, again."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dissect.cli import options
from dissect.cli.opening import figure_formats, note
from unlearning.terminal import write_json

EXAMPLES = """\b
Examples:
  dissect plot runs/patch-demo-npo
  dissect plot runs/patch-demo-npo --format html,pdf,svg,png
"""


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory of a finished run.")],
    formats: options.Formats = "html",
    quiet: Annotated[bool, typer.Option("--quiet", help="No list of what was written.")] = False,
    as_json: options.Json = False,
) -> None:
    """Draw the figures of a finished run again, in the formats that a paper needs."""
    from dissect.results import load_result

    wanted = figure_formats(formats)
    exported = load_result(run).save_figures(run, formats=wanted)
    if exported.problem:
        note(exported.problem)
    if as_json:
        write_json({"figures": [str(path) for path in exported.paths], "problem": exported.problem})
    elif not quiet:
        sys.stdout.writelines(f"{path}\n" for path in exported.paths)
