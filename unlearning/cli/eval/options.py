"""Options that the benchmarks share, with their help."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(metavar="M", help="Evaluated model: directory, adapter, hub id or built-in name.")]
Control = Annotated[
    str | None,
    typer.Option(metavar="C", help="Control: a model never trained on the forget set; its results are cached by hash."),
]
ControlResult = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Run directory of the control's evaluation with the same options, instead."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory of the data sets (tofu/, ...).  [default: $DISSECT_DATA, then the hub]"
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run directory; an unfinished run resumes.  [default: runs/eval-...]")
]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Use only the first N rows of each set.")]
Template = Annotated[
    str | None, typer.Option(help="Text around each question.  [default: 'Question: {question}\\nAnswer:']")
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts by the tokenizer's chat template.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: a GPU if any]")]
Dtype = Annotated[str | None, typer.Option(help="float32 or float64; on a GPU also bfloat16, float16.")]
Seed = Annotated[int, typer.Option(help="Random seed (bootstrap, and whatever the benchmark draws).")]
BatchSize = Annotated[int, typer.Option(help="Rows scored at a time; no number depends on it.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled .bin weights.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code of a hub model.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar and no table.")]
Json = Annotated[bool, typer.Option("--json", help="Write the summary as JSON to stdout.")]
