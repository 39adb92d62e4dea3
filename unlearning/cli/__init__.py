"""The command line `unlearn`. Heavy packages are imported by the commands, so that every `--help` is instant."""

from collections.abc import Sequence

import typer

from unlearning.cli.cache import EXAMPLES as CACHE_EXAMPLES
from unlearning.cli.cache import cache as cache_command
from unlearning.cli.eval import RENAMED, eval_app
from unlearning.cli.labels import labels_app
from unlearning.cli.methods import EXAMPLES as METHODS_EXAMPLES
from unlearning.cli.methods import methods as methods_command
from unlearning.cli.train import EXAMPLES as TRAIN_EXAMPLES
from unlearning.cli.train import train as train_command
from unlearning.common.terminal import run_app

# \b keeps the line breaks of the following lines.
_EXAMPLES = """\b
Examples:
  unlearn methods
  unlearn train npo --model demo:base --forget forget.json --retain retain.json --out runs/npo
"""

app = typer.Typer(
    help="Train language models with unlearning methods, and evaluate the result.",
    epilog=_EXAMPLES,
    rich_markup_mode=None,  # rich would join the lines of the examples
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("train", epilog=TRAIN_EXAMPLES)(train_command)
app.command("methods", epilog=METHODS_EXAMPLES)(methods_command)
app.command("cache", epilog=CACHE_EXAMPLES)(cache_command)
app.add_typer(labels_app, name="labels")
app.add_typer(eval_app, name="eval")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 on success, 2 on bad input with one line on stderr, 130 on Ctrl-C.

    Args:
        arguments: Arguments in place of those of the process.
    """
    run_app(
        app,
        "unlearn",
        arguments,
        interrupted="only checkpoints are kept; add --resume to continue from them",
        renamed={"eval": RENAMED},
    )
