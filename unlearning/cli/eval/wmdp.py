"""`unlearn eval wmdp`: WMDP's questions on biology, chemistry and cybersecurity."""

from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark

EXAMPLES = """\b
Examples:
  unlearn eval wmdp --model runs/rmu --data-dir ../data
  unlearn eval wmdp --model runs/rmu --sets bio,cyber --scoring letter --permute 3 --out runs/wmdp-rmu
  unlearn eval wmdp --model ./rmu --control ./base --chat --json

\b
--data-dir DIR holds wmdp/bio_questions.json, chem_questions.json and cyber_questions.json, as published by the authors,
or a copy of the hub's cais/wmdp as wmdp/ (wmdp-bio/test-00000-of-00001.parquet, ...).
"""


def command(
    *,
    model: options.Model,
    sets: Annotated[str, typer.Option(metavar="LIST", help="Question sets, of bio, chem, cyber.")] = "bio,chem,cyber",
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
    control: options.ControlOptions,
    data_dir: options.DataDir = None,
    chat: options.Chat = False,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Ask WMDP's questions on biology, chemistry and cybersecurity, zero-shot; chance is 0.25."""
    run_benchmark(
        "wmdp",
        model,
        control,
        run,
        sets=sets,
        scoring=scoring,
        permute=permute,
        data_dir=data_dir,
        chat=chat,
        limit=limit,
        seed=seed,
    )
