"""Options that the benchmarks share: their names, their words, their help."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(metavar="M", help="Model: directory, adapter, hub id or built-in name.")]
RetainModel = Annotated[
    str | None,
    typer.Option(metavar="N", help="A model trained without the forget set; evaluated once, then remembered by hash."),
]
RetainResult = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Or the run directory of its evaluation with the same options."),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Holds the data sets (tofu/, ...).  [default: $DISSECT_DATA, then the hub]"),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run directory; goes on where it stopped.  [default: runs/eval-...]")
]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Use the first N rows of each set only.")]
Template = Annotated[str | None, typer.Option(help="Wraps questions.  [default: 'Question: {question}\\nAnswer:']")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap by the tokenizer's chat template.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: a GPU if any]")]
Dtype = Annotated[str | None, typer.Option(help="float32 or float64; on a GPU also bfloat16, float16.")]
Seed = Annotated[int, typer.Option(help="Of the bootstrap draws and of whatever is drawn at random.")]
BatchSize = Annotated[int, typer.Option(help="Rows at a time; no number depends on it.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled .bin weights.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run a hub model's code.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")]
Json = Annotated[bool, typer.Option("--json", help="The summary on stdout.")]
