"""The command line `python -m dissect.zoo.build`; torch is imported only after the arguments are parsed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dissect.zoo.paths import DIRECTORY
from unlearning.common.terminal import run_app

_EXAMPLES = """\b
Examples:
  python -m dissect.zoo.build --out /tmp/zoo
  python -m dissect.zoo.build --family demo --out /tmp/zoo --seed 7
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog=_EXAMPLES)
def command(
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Write models, question sets and model card to DIR.  [default: this package]",
            show_default=False,
        ),
    ] = (DIRECTORY),
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the pretrained models and timings in DIR.  [default: OUT/.work]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Replace the recipes' random seed (20).")] = None,
    family: Annotated[str, typer.Option(help="Build one family (demo or demo-neox) or all.")] = "all",
) -> None:
    """Build the built-in models that do not exist yet, with question sets and model card."""
    from dissect.zoo.builder import build

    build(out, family=family, seed=seed, work=work)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    interrupted = "rerun the same command to resume after the last finished model"
    run_app(app, "python -m dissect.zoo.build", arguments, interrupted=interrupted)


if __name__ == "__main__":
    main()
