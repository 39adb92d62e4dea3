"""`unlearn eval`: one command per benchmark, each with its own options."""

from types import ModuleType

import typer

from unlearning.cli.eval import choice, conceptvectors, familiarity, lm_eval, mia, muse, quality, tofu, wmdp
from unlearning.common.option_groups import expand_groups

COMMANDS: dict[str, ModuleType] = {
    "muse": muse,
    "mia": mia,
    "quality": quality,
    "tofu": tofu,
    "wmdp": wmdp,
    "choice": choice,
    "familiarity": familiarity,
    "conceptvectors": conceptvectors,
    "lm-eval": lm_eval,
}
"""Module of each benchmark, with `command` and `EXAMPLES`."""

_EXAMPLES = """\b
Examples:
  unlearn eval tofu --model runs/npo --control ./retain90 --forget forget10 --data-dir ../data
  unlearn eval familiarity --model runs/whp --prompts studies.json --control ./control
  unlearn eval conceptvectors --model runs/npo --base ./base --concepts concepts.json
  unlearn eval quality --model runs/npo --prompts forget.json --base demo:base
  unlearn eval wmdp --model runs/rmu --data-dir ../data --permute 3
  unlearn eval choice --model runs/npo --questions quiz.json --role forget
  unlearn eval muse --corpus news --model runs/npo --control ./news-retrained --data-dir ../data
  unlearn eval mia --model runs/npo --forget forget.json --holdout unseen.json --control ./control
  unlearn eval lm-eval --model runs/npo --tasks mmlu,winogrande,hellaswag --limit 200
"""

eval_app = typer.Typer(
    help="Measure what a model forgot, what it retained, and whether it still writes text.",
    epilog=_EXAMPLES,
    rich_markup_mode=None,
    no_args_is_help=True,
)
for name, module in COMMANDS.items():
    eval_app.command(name, epilog=module.EXAMPLES)(expand_groups(module.command))

RENAMED = {"--retain-model": "--control", "--retain-result": "--control-result", "--data": "--data-dir"}
"""Old spellings of flags, which work in this version only."""
