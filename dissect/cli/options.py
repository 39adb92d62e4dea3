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
Window = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Layers replaced together, odd widths.  [default: 5 and 1, and --suffix]",
        show_default=False,
    ),
]
Prefix = Annotated[bool, typer.Option("--prefix", help="Windows of layers 0 to l, for every l.")]
Suffix = Annotated[bool, typer.Option("--suffix", help="Windows of layer l to the last, for every l.")]
Layers = Annotated[str | None, typer.Option(metavar="LIST", help="One window of these layers, as 3,7,12-15.")]
Direction = Annotated[
    str, typer.Option(help="base-to-unlearned: what comes back; unlearned-to-base: what breaks in the base.")
]
Donor = Annotated[
    str,
    typer.Option(metavar="LIST", help="Donors to be subtracted: other-question, noise, or a third model."),
]
Null = Annotated[int, typer.Option(metavar="N", help="Also N models with random updates of the unlearned one's norms.")]
ShowPrompts = Annotated[
    int | None, typer.Option(metavar="N", help="Show N prompts with their answer positions, and stop.")
]
Engine = Annotated[str, typer.Option(help="How interventions are run: wavefront or reference.")]
ChunkTokens = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens through a block at once.  [default: measured]")
]
Precision = Annotated[str, typer.Option(help="Of float32 on a GPU: highest, or high for TF32.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, and stop.")]
Scoring = Annotated[str, typer.Option(help="answer, or notebook to replicate the released notebooks.")]
Template = Annotated[str | None, typer.Option(help="Wraps questions.  [default: 'Question: {question}\\nAnswer:']")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap by the tokenizer's chat template.")]
Answers = Annotated[str, typer.Option(help="given, or base for the base model's greedy continuations.")]
MaxNewTokens = Annotated[int, typer.Option(help="Length of those continuations, in tokens.")]
Limit = Annotated[int | None, typer.Option(help="Use the first so many prompts only.")]
Formats = Annotated[str, typer.Option("--format", metavar="LIST", help="Figures: html, pdf, svg, png.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: a GPU if any]")]
Dtype = Annotated[str | None, typer.Option(help="float32 or float64; on a GPU also bfloat16, float16.")]
Seed = Annotated[int, typer.Option(help="Of the bootstrap draws and of whatever is drawn at random.")]
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
