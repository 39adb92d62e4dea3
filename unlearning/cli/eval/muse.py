"""`unlearn eval muse`: verbatim and knowledge memorisation, privacy leakage and utility on News or Books."""

from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark
from unlearning.common.errors import InputError

EXAMPLES = """\b
Examples:
  unlearn eval muse --corpus news --model runs/npo --control ./news-retrained --data-dir ../data
  unlearn eval muse --corpus books --model runs/npo --auc-retain 0.5393
  unlearn eval muse --corpus news --model runs/npo --control-result runs/eval-muse-retrained --limit 20 --json

\b
The directory of --data-dir holds muse-news/ or muse-books/, laid out as on the hub (muse-bench/MUSE-News): verbmem/,
knowmem/, privleak/. Metrics without data are listed as left out.
"""


def command(
    *,
    model: options.Model,
    corpus: Annotated[str, typer.Option(metavar="NAME", help="Corpus: news or books.")],
    control: options.ControlOptions,
    auc_retain: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            help="AUC of a retrained model, for PrivLeak without a control (Min-40 % of MUSE's released models: news "
            "0.4772, books 0.5393; valid for no other model or data).",
        ),
    ] = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Evaluate on MUSE: VerbMem, KnowMem on forget and retain questions, PrivLeak."""
    if auc_retain is not None and (control.control is not None or control.control_result is not None):
        raise InputError("--auc-retain replaces a control, and a control is given too. Give one of them.")
    run_benchmark(
        "muse", model, control, run, corpus=corpus, auc_retain=auc_retain, data_dir=data_dir, limit=limit, seed=seed
    )
