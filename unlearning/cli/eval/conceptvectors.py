"""`unlearn eval conceptvectors`: concepts' value vectors, and what the model still says about the concepts."""

from pathlib import Path
from typing import Annotated

import typer

from unlearning.cli.eval import options
from unlearning.cli.eval.running import run_benchmark

EXAMPLES = """\b
Examples:
  unlearn eval conceptvectors --model runs/npo --base meta-llama/Llama-2-7b-chat-hf --data-dir ../data
  unlearn eval conceptvectors --model runs/npo --base ./base --concepts concepts.json --noise 0,.1,.3
  unlearn eval conceptvectors --model runs/npo --base ./base --concepts concepts.json --no-vectors --limit 5 --json

\b
A record is ConceptVectors' own: {"Concept", "QA": [...], "text_completion": [{"First_half"}, ...],
"unrelated_QA": [...], "Layer", "Dim", "wikipedia_content"}. Layer and Dim belong to the model in which the vectors
were found; for any other model give --no-vectors. --noise disturbs the base's vectors, one concept at a time: the
base's texts about that concept should change, and no others.
"""


def command(
    *,
    model: options.Model,
    base: Annotated[
        str | None, typer.Option(metavar="B", help="The model before unlearning, which every score compares with.")
    ] = None,
    concepts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="ConceptVectors' records.  [default: those in --data-dir]")
    ] = None,
    vectors: Annotated[
        bool, typer.Option("--vectors/--no-vectors", help="Compare the value vectors that the records name.")
    ] = True,
    noise: Annotated[
        str, typer.Option(metavar="S,S", help="Standard deviations of noise on the base's vectors; the paper's: 0.1.")
    ] = "",
    control: options.ControlOptions,
    data_dir: options.DataDir = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum tokens of a text.")] = 100,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use only the first N concepts.")] = None,
    per_concept: Annotated[
        int | None, typer.Option(metavar="N", help="Use only the first N questions of each kind per concept.")
    ] = None,
    seed: options.Seed = 0,
    run: options.RunOptions,
) -> None:
    """Measure whether concepts were erased from the parameters, and from what the model says."""
    run_benchmark(
        "conceptvectors",
        model,
        control,
        run,
        base=base,
        concepts=concepts,
        vectors=vectors,
        noise=noise,
        data_dir=data_dir,
        max_new_tokens=max_new_tokens,
        limit=limit,
        per_concept=per_concept,
        seed=seed,
    )
