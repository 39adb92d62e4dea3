"""The command line `dissect`: parses, then imports what is heavy, so that every `--help` is instant."""

from collections.abc import Sequence

import typer

from dissect.cli import behave, decompose, models, patch, plot, probe, restore, verdict
from dissect.runtime.processes import silence_other_processes
from unlearning.common.terminal import run_app

# \b keeps the lines that follow as they are.
_EXAMPLES = """\b
Examples:
  dissect models
  dissect verdict --base demo:base --unlearned demo:npo
  dissect patch --base demo:base --unlearned demo:npo
  dissect restore --base demo:base --unlearned demo:npo --sites value_vectors,key_vectors
  dissect decompose --base demo:base --unlearned demo:npo
  dissect probe --base demo:base --unlearned demo:npo --limit 60
  dissect behave --base demo:base --unlearned demo:npo
  dissect plot runs/patch-demo-npo --format pdf
"""

app = typer.Typer(
    help="Was the knowledge erased from a language model's parameters, or merely suppressed?",
    epilog=_EXAMPLES,
    rich_markup_mode=None,  # rich would join the examples' lines
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for name, module in (
    ("verdict", verdict),
    ("patch", patch),
    ("restore", restore),
    ("decompose", decompose),
    ("probe", probe),
    ("behave", behave),
    ("plot", plot),
    ("models", models),
):
    app.command(name, epilog=module.EXAMPLES)(module.command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    with silence_other_processes():
        run_app(
            app,
            "dissect",
            arguments,
            interrupted="finished batches are kept: run the same command again to go on from there",
        )
