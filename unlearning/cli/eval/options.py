"""Options that the benchmarks share, with their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(metavar="M", help="Evaluated model: directory, adapter, hub id or built-in name.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory of the data sets (tofu/, ...).  [default: $DISSECT_DATA, then the hub]"
    ),
]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Use only the first N rows of each set.")]
Template = Annotated[
    str | None,
    typer.Option(
        help="Text around each question.  [default: as the model was trained, else 'Question: {question}\\nAnswer:']"
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts by the tokenizer's chat template.")]
TrainedChat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Wrap prompts by the tokenizer's chat template, or do not.  [default: as the model was trained, else not]",
        show_default=False,
    ),
]
AppendEos = Annotated[
    bool | None,
    typer.Option(
        "--append-eos/--no-append-eos",
        help="Score answers with the end-of-sequence token.  [default: as the model was trained, else with it]",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Random seed (bootstrap, and whatever the benchmark draws).")]


@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """The control that metrics are compared with."""

    control: Annotated[
        str | None,
        typer.Option(
            metavar="C", help="Control: a model never trained on the forget set; its results are cached by hash."
        ),
    ] = None
    control_result: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory of the control's evaluation with the same options, instead."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every benchmark: where its run goes, and how the model is loaded."""

    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory; an unfinished run resumes.  [default: runs/eval-...]"),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: a GPU if any]")
    ] = None
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; on a GPU also bfloat16, float16.")] = None
    batch_size: Annotated[int, typer.Option(help="Rows scored at a time; no number depends on it.")] = 16
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled .bin weights.")] = False
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the code of a hub model.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar and no table.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Write the summary as JSON to stdout.")] = False
