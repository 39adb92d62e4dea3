"""Options that several commands share: name, help and default of each, declared once.

A command takes a group of options as one parameter (`pair: PairOptions`); `unlearning.common.option_groups` declares an
option per field.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from unlearning.common.errors import InputError

Data = Annotated[
    Path | None,
    typer.Option(metavar="D", help="File of forget prompts (.json, .jsonl).  [default: a built-in pair's own]"),
]
Retain = Annotated[
    Path | None,
    typer.Option(metavar="R", help="File of retain prompts.  [default: those in --data, or a built-in pair's own]"),
]
Seed = Annotated[int, typer.Option(help="Random seed (bootstrap, random donors and neurons).")]
BatchSize = Annotated[int, typer.Option(help="Largest number of prompts per batch; does not change any score.")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Read weights layer by layer.  [default: if they do not fit in memory]"),
]
Null = Annotated[
    int,
    typer.Option(
        metavar="N", help="Number of null models: the base with random updates of the same norms as unlearning's."
    ),
]
Scoring = Annotated[str, typer.Option(help="answer, or notebook to replicate the released notebooks.")]
AnswerTokens = Annotated[
    int, typer.Option("--max-new-tokens", help="Length of the base model's answers, in tokens (if the file has none).")
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Template of a question.  [default: as the unlearned model was trained, else "
        "'Question: {question}\\nAnswer:']"
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Use the tokenizer's chat template, or do not.  [default: as the unlearned model was trained, else not]",
        show_default=False,
    ),
]
Formats = Annotated[str, typer.Option("--format", metavar="LIST", help="Formats of figures: html, pdf, svg, png.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


Base = Annotated[str, typer.Option(metavar="B", help="Base model: directory, hub id or built-in name.")]
Unlearned = Annotated[str, typer.Option(metavar="U", help="The base model after unlearning.")]


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Names of the models that are compared."""

    base: Base
    unlearned: Unlearned
    control: Annotated[
        str,
        typer.Option(
            metavar="C",
            help="Control: never trained on the forget facts, from the base's pretrained model; none for no control.  "
            "[default: a built-in pair's own]",
            show_default=False,
        ),
    ] = "auto"
    align: Annotated[
        bool,
        typer.Option(
            "--align", help="Put all models into the base's basis first: order, signs and scales of their units."
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models are loaded."""

    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, or auto for all GPUs.  [default: a GPU if there is one]")
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float64; on a GPU also bfloat16 or float16.  [default: float32]")
    ] = None
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled .bin weights.")] = False
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a hub model.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompts are read.

    Raises:
        InputError: A value is unknown.
    """

    template: Template = None
    chat: Chat = None
    answers: Annotated[
        str, typer.Option(help="given (in the file), or base for the base model's greedy continuations.")
    ] = "given"
    limit: Annotated[int | None, typer.Option(metavar="N", help="Use only the first N prompts of each file.")] = None

    def __post_init__(self) -> None:
        """Check the values."""
        choice("--answers", self.answers, "given", "base")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of a layer sweep, except its sites.

    Raises:
        InputError: A value is unknown or out of range.
    """

    window: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Odd numbers of layers replaced together.  [default: 5 and 1, and --suffix]",
            show_default=False,
        ),
    ] = None
    prefix: Annotated[bool, typer.Option("--prefix", help="Use windows of layers 0 to l, for every l.")] = False
    suffix: Annotated[bool, typer.Option("--suffix", help="Use windows of layer l to the last, for every l.")] = False
    layers: Annotated[
        str | None, typer.Option(metavar="LIST", help="Use one window of these layers, such as 3,7,12-15.")
    ] = None
    direction: Annotated[
        str,
        typer.Option(
            help="base-to-unlearned (what comes back in the unlearned model) or unlearned-to-base (what breaks in the "
            "base)."
        ),
    ] = "base-to-unlearned"
    donor: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Additional donors, to subtract: other-question, noise, or the name of a third model."
        ),
    ] = "base"
    null: Null = 0
    scoring: Scoring = "answer"
    max_new_tokens: AnswerTokens = 30
    show_prompts: Annotated[
        int | None, typer.Option(metavar="N", help="Show N prompts with their answer positions, then stop.")
    ] = None
    engine: Annotated[str, typer.Option(help="wavefront, or reference (slow; the same scores).")] = "wavefront"
    seed: Seed = 0
    batch_size: BatchSize = 16
    chunk_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens per pass through a block.  [default: measured]")
    ] = None
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory limit, such as 6GiB.  [default: most of the free memory]")
    ] = None
    stream: Stream = None
    precision: Annotated[
        str, typer.Option(help="Precision of float32 products on a GPU: highest, or high for TF32.")
    ] = "highest"
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be computed, then stop.")] = False

    def __post_init__(self) -> None:
        """Check the values."""
        choice("--direction", self.direction, "base-to-unlearned", "unlearned-to-base")
        choice("--scoring", self.scoring, "answer", "notebook")
        choice("--engine", self.engine, "wavefront", "reference")
        choice("--precision", self.precision, "highest", "high")
        for flag, number in (("--show-prompts", self.show_prompts), ("--chunk-tokens", self.chunk_tokens)):
            if number is not None and number < 1:
                raise InputError(f"{flag} must be at least 1, got {number}")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where results go."""

    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run directory.  [default: runs/COMMAND-U]"),
    ] = None
    formats: Formats = "html"
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar and no table.")] = False
    as_json: Json = False


def choice(flag: str, value: str, *known: str) -> Any:
    """Return the value if it is one of the known ones.

    Args:
        flag: Flag of the option.
        value: What the user gave.
        *known: Values that the option accepts.

    Returns:
        The value, typed as Any so that it passes as a Literal.

    Raises:
        InputError: The value is unknown.
    """
    if value not in known:
        raise InputError(f"{flag} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
    return value
