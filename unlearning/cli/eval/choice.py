"""`unlearn eval choice`: any multiple-choice questions."""

from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark

EXAMPLES = """\b
Examples:
  unlearn eval choice --model runs/npo --questions quiz.json
  unlearn eval choice --model runs/npo --questions birthdays.jsonl --role forget --permute 5
  unlearn eval choice --model runs/npo --questions anatomy_test.csv --few-shot anatomy_dev.csv --subject anatomy
  unlearn eval choice --model runs/npo --questions a.json --questions b.parquet --questions wmdp:bio --scoring letter

\b
A record has "question", "choices" (2 to 26 texts; or one under each of "A", "B", ...) and "answer": the index of the
right choice, from 0, or its letter. "subject", "group" (drawn whole by the bootstrap) and "id" are optional.
"""


def command(
    *,
    model: options.Model,
    questions: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            help="Questions: .json, .jsonl, .csv, .parquet, wmdp:bio, hub:owner/name:config; may be repeated.",
        ),
    ],
    role: Annotated[
        str, typer.Option(help="What a good unlearned model does: forget (fails), retain (answers), or none.")
    ] = "none",
    scoring: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Scorings: letter (options listed, letters scored), answer (listed, texts scored), cloze (hidden).",
        ),
    ] = "letter,answer,cloze",
    permute: Annotated[
        int, typer.Option(metavar="N", help="Ask every question again in N other orders of its options.")
    ] = 0,
    subject: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Subject that the prompt names.  [default: each record's]")
    ] = None,
    few_shot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Show solved questions of the same subject from this file.")
    ] = None,
    shots: Annotated[int, typer.Option(metavar="K", help="Show the first K of them.")] = 5,
    control: options.ControlOptions,
    data_dir: options.DataDir = None,
    chat: options.Chat = False,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Ask any multiple-choice questions, by letter, by the options' texts, and without showing the options."""
    run_benchmark(
        "choice",
        model,
        control,
        run,
        questions=questions,
        role=role,
        scoring=scoring,
        permute=permute,
        subject=subject,
        few_shot=few_shot,
        shots=shots,
        data_dir=data_dir,
        chat=chat,
        limit=limit,
        seed=seed,
    )
