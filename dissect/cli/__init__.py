"""The command line `dissect`. Commands import torch only after parsing, so that every `--help` is instant."""

from collections.abc import Sequence

import typer

from dissect.cli import behave, decompose, models, patch, plot, probe, restore, verdict
from dissect.runtime.processes import silence_other_processes
from unlearning.common.option_groups import expand_groups
from unlearning.common.terminal import run_app

# click does not rewrap the lines after \b.
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
    rich_markup_mode=None,  # rich would join the lines of the examples
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
    app.command(name, epilog=module.EXAMPLES)(expand_groups(module.command))


RENAMED = {
    "verdict": {"--never": "--control", "--facts": "--limit", "--benign": "--general"},
    "probe": {"--unrelated": "--retain"},
    "behave": {"--unrelated": "--retain"},
}
"""Old spellings of flags by command; they work for one version and are not in the help."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 on bad input with one line on stderr, 130 on Ctrl-C."""
    with silence_other_processes():
        run_app(
            app,
            "dissect",
            arguments,
            interrupted="finished batches are kept; rerun the same command to resume",
            renamed=RENAMED,
        )
