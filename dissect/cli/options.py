"""Options that several commands share: their names, their words, their help."""

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Option(metavar="B", help="Base model: directory, hub id or built-in name.")]
Unlearned = Annotated[str, typer.Option(metavar="U", help="The same model after unlearning.")]
Data = Annotated[
    Path | None,
    typer.Option(metavar="D", help="Prompts with answers (.json, .jsonl).  [default: the built-in forget set]"),
]
Control = Annotated[
    str,
    typer.Option(metavar="N", help="A model that never knew, from the same trunk; `none` for no control."),
]
Scoring = Annotated[str, typer.Option(help="answer, or notebook to replicate the released notebooks.")]
Template = Annotated[str | None, typer.Option(help="Wraps questions.  [default: 'Question: {question}\\nAnswer:']")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap by the tokenizer's chat template.")]
Answers = Annotated[str, typer.Option(help="given, or base for the base model's greedy continuations.")]
MaxNewTokens = Annotated[int, typer.Option(help="Length of those continuations, in tokens.")]
Limit = Annotated[int | None, typer.Option(help="Use the first so many prompts only.")]
Formats = Annotated[str, typer.Option("--format", metavar="LIST", help="Figures: html, pdf, svg, png.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: a GPU if any]")]
Dtype = Annotated[str | None, typer.Option(help="float32 or float64; on a GPU also bfloat16, float16.")]
Seed = Annotated[int, typer.Option(help="Of the bootstrap draws.")]
BatchSize = Annotated[int, typer.Option(help="Most prompts in a batch; no number depends on it.")]
MaxMemory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="As 6GiB; work is cut to it.  [default: most of what is free]")
]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Read weights layer by layer.  [default: where they do not fit]"),
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled .bin weights.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run a hub model's code.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
