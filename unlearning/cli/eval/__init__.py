"""`unlearn eval`: one command a benchmark, each with its own options."""

from types import ModuleType

import typer

from unlearning.cli.eval import choice, conceptvectors, familiarity, lm_eval, mia, muse, quality, tofu, wmdp

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
"""By name; each module has `command` and `EXAMPLES`."""

_EXAMPLES = """\b
Examples:
  unlearn eval tofu --model runs/npo --retain-model ./retain90 --forget forget10 --data ../data
  unlearn eval familiarity --model runs/whp --prompts studies.json --retain-model ./never
  unlearn eval conceptvectors --model runs/npo --base ./base --concepts concepts.json
  unlearn eval quality --model runs/npo --prompts forget.json --base demo:base
  unlearn eval wmdp --model runs/rmu --data ../data --permute 3
  unlearn eval choice --model runs/npo --questions quiz.json --role forget
  unlearn eval muse --corpus news --model runs/npo --retain-model ./news-retrained --data ../data
  unlearn eval mia --model runs/npo --forget forget.json --holdout unseen.json --retain-model ./never
  unlearn eval lm-eval --model runs/npo --tasks mmlu,winogrande,hellaswag --limit 200
"""

eval_app = typer.Typer(
    help="Measure what a model forgot, kept, and became.",
    epilog=_EXAMPLES,
    rich_markup_mode=None,
    no_args_is_help=True,
)
for name, module in COMMANDS.items():
    eval_app.command(name, epilog=module.EXAMPLES)(module.command)
