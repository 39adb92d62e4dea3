"""`python -m analyses.defaults`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from unlearning.common.errors import InputError, nearest
from unlearning.common.terminal import console, run_app, write_json

_EXAMPLES = """\b
Examples:
  python -m analyses.defaults
  python -m analyses.defaults --method npo --method blur --out runs/two
  python -m analyses.defaults --tofu runs/tofu --model ./SmolLM2-135M-Instruct
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    tofu: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also try the TOFU pair that analyses.tofu_pair built in DIR.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="M", help="Also try a language model that knows capitals; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Output directory; a stopped study continues.")] = Path(
        "runs/defaults"
    ),
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Try only this method; may be repeated.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress and no table.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")] = False,
) -> None:
    """Try every method with its defaults alone."""
    import json

    from analyses.defaults.run import NAMES, run
    from analyses.defaults.tables import frame_of, markdown
    from analyses.defaults.worlds import demo_world, language_model_world, tofu_world
    from unlearning.common.runs import write_bytes

    for name in method or []:
        if name not in NAMES:
            hint = nearest(name, NAMES) or f"; there are {', '.join(NAMES)}"
            raise InputError(f"--method must name a method that forgets, got {name!r}{hint}")
    worlds = [demo_world()]
    if tofu is not None:
        worlds.append(tofu_world(tofu))
    worlds += [language_model_world(name) for name in model or []]
    rows = [row for world in worlds for row in run(world, out, methods=method or NAMES, progress=not quiet)]
    frame, table = frame_of(rows), markdown(rows)
    write_bytes(out / "table.csv", frame.to_csv(index=False).encode())
    write_bytes(out / "table.md", table.encode())
    if as_json:
        write_json(json.loads(frame.to_json(orient="records")))
    elif not quiet:
        console().print(table, markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    run_app(app, "python -m analyses.defaults", arguments, interrupted="rerun the same command to resume")
