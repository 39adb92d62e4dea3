"""`unlearn eval lm-eval`: general abilities, by lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark

EXAMPLES = """\b
Examples:
  unlearn eval lm-eval --model runs/npo --tasks mmlu,winogrande,hellaswag --limit 200
  unlearn eval lm-eval --model runs/npo --tasks arc_easy,arc_challenge,boolq,piqa,openbookqa --data-dir ./benchmarks
  unlearn eval lm-eval --model runs/npo --tasks my_quiz --tasks-dir ./tasks --num-fewshot 5

\b
Needs lm-evaluation-harness: pip install 'dissect-unlearning[eval]'.
--data-dir DIR is searched for each task's splits, as .parquet, .jsonl or .json with the hub's columns:
  DIR/arc_easy/test.jsonl                  by the task's name (also train.jsonl, if solved examples are shown)
  DIR/mmlu/anatomy/test-00000-of-00001.parquet   a copy of the hub's data set, by its name and configuration
The rest comes from the hub, unless HF_HUB_OFFLINE=1.
"""


def command(
    *,
    model: options.Model,
    tasks: Annotated[
        str, typer.Option(metavar="LIST", help="Tasks, groups or tags of lm-evaluation-harness.")
    ] = "mmlu,winogrande,hellaswag,arc_challenge,arc_easy,boolq,piqa,openbookqa",
    tasks_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Directory of your own tasks (.yaml).")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="Solved examples shown.  [default: each task's own]")
    ] = None,
    control: options.ControlOptions,
    data_dir: options.DataDir = None,
    chat: options.Chat = False,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Run MMLU, WinoGrande, HellaSwag, ARC, BoolQ, PIQA, OpenBookQA and every other task of lm-evaluation-harness."""
    run_benchmark(
        "lm-eval",
        model,
        control,
        run,
        tasks=tasks,
        tasks_dir=tasks_dir,
        num_fewshot=num_fewshot,
        data_dir=data_dir,
        chat=chat,
        limit=limit,
        seed=seed,
    )
