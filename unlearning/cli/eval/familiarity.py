"""`unlearn eval familiarity`: how familiar a text still is (Who's Harry Potter)."""

from pathlib import Path
from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark

EXAMPLES = """\b
Examples:
  unlearn eval familiarity --model runs/whp --prompts studies.json --control ./control
  unlearn eval familiarity --model runs/whp --prompts studies.json --judge my_judges:ask_a_model --json

\b
The file is a JSON list or JSON lines. Probability form, candidates for the next words:
  {"prompt": "Every morning Mira went to", "specific": ["Halvik", "the Grey Tower"], "generic": ["work", "school"]}
Completion form, names and ideas of the text, and its themes:
  {"prompt": "Mira opened the door and", "references": ["Halvik", "the Grey Tower"], "subtle": ["a lantern"]}

\b
A candidate counts by its first token; tokens that begin candidates of both kinds count for neither. A judge is
called with prompt and completion and returns 1 (names or ideas of the text), 2 (its themes), 3 (perhaps a
coincidence) or 4 (nothing). Without a judge, a rule looks for whole words that the prompt does not have.
"""


def command(
    *,
    model: options.Model,
    prompts: Annotated[Path, typer.Option(metavar="FILE", help="Prompts with candidates, or with names and themes.")],
    judge: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Judge completions by this function instead of the rule."),
    ] = None,
    control: options.ControlOptions,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum tokens of a completion.")] = 100,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Measure how familiar a text still is, by next tokens and by completions (Who's Harry Potter)."""
    run_benchmark(
        "familiarity",
        model,
        control,
        run,
        prompts=prompts,
        judge=judge,
        max_new_tokens=max_new_tokens,
        limit=limit,
        seed=seed,
    )
