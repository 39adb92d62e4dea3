"""From what a user typed to models and prompts; what can be told wrong without loading is told first."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dissect import zoo
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.models.model import Model
    from dissect.models.pair import ModelPair
    from dissect.prompts.prompts import Prompts
    from dissect.runtime.processes import Processes


@dataclass(frozen=True)
class ModelOptions:
    """How models are loaded, as `dissect.load_model` and `load_pair` take it."""

    device: str | None = None
    dtype: str | None = None
    stream: bool | None = None
    max_memory: int | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are read, as `dissect.load_prompts` takes it; words are checked when it is made.

    Raises:
        InputError: a word that is not known.
    """

    scoring: str = "answer"
    template: str | None = None
    chat: bool = False
    answers: str = "given"
    max_new_tokens: int = 30
    limit: int | None = None

    def __post_init__(self) -> None:
        choice("--scoring", self.scoring, "answer", "notebook")
        choice("--answers", self.answers, "given", "base")


def choice(option: str, value: str, *known: str) -> Any:
    """The value, if it is one of the known words.

    Raises:
        InputError: it is not.
    """
    if value not in known:
        raise InputError(f"{option} {value}: use {' or '.join(known)}")
    return value


def figure_formats(text: str) -> list[str]:
    """A comma-separated list of figure formats.

    Raises:
        InputError: one is unknown.
    """
    from dissect.plotting import check_formats

    formats = [name.strip() for name in text.split(",") if name.strip()]
    check_formats(formats)
    return formats


def find_data(data: Path | None, base: str) -> Path:
    """The file of prompts, by default a built-in pair's; a broken file is told of before models are loaded.

    Raises:
        InputError: no file where one is needed, or one that cannot be read.
    """
    from unlearning.data.records import read_records

    if data is None:
        if base not in zoo.BUILTIN:
            raise InputError("--data is missing: name a file of prompts with answers (.json or .jsonl)")
        data = zoo.default_prompts(base.partition(":")[0])
    read_records(data)
    return data


def open_pair(base: str, unlearned: str, options: ModelOptions, processes: "Processes") -> "ModelPair":
    """Load both models."""
    _quiet_libraries()
    from dissect.models.pair import load_pair

    return load_pair(
        base,
        unlearned,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        stream=options.stream,
        max_memory=options.max_memory,
        progress=not options.quiet,
        processes=processes,
    )


def open_control(name: str, pair: "ModelPair", options: ModelOptions) -> "Model | str | None":
    """The control that was named, loaded as the pair was; `auto` is left to the sweep, `none` is none."""
    if name in ("auto", "none"):
        return "auto" if name == "auto" else None
    return _third_model(name, pair, options)


def open_donors(names: str, pair: "ModelPair", options: ModelOptions) -> "list[Model | str]":
    """The donors that were named, models loaded as the pair was."""
    from dissect.interventions.donors import KINDS

    named = [name.strip() for name in names.split(",") if name.strip()]
    return [name if name in ("base", *KINDS) else _third_model(name, pair, options) for name in named]


def _third_model(name: str, pair: "ModelPair", options: ModelOptions) -> "Model":
    from dissect.models.model import load_model

    return load_model(
        name,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        stream=pair.base.streamed is not None,
        progress=not options.quiet,
    )


def open_prompts(data: Path, pair: "ModelPair", options: PromptOptions) -> "Prompts":
    """Read, wrap and tokenise the prompts."""
    from dissect.prompts.loading import load_prompts

    return load_prompts(
        data,
        pair.tokenizer,
        scoring=choice("--scoring", options.scoring, "answer", "notebook"),
        template=None if options.template is None else options.template.replace("\\n", "\n"),
        chat=options.chat,
        answers=choice("--answers", options.answers, "given", "base"),
        answers_from=pair.base,
        max_new_tokens=options.max_new_tokens,
        limit=options.limit,
    )


def short_name(model: str) -> str:
    """A model's name as part of a directory's: `demo-npo`, or the last part of a path."""
    return model.replace(":", "-") if model in zoo.BUILTIN else Path(model).name


def earlier_run(out: Path) -> str | None:
    """What a run directory holds already of the run that is about to go on there, to be told afterwards."""
    from unlearning.common.runs import Run, read_record

    if not (out / "run.json").is_file():
        return None
    run = Run(out, read_record(out))
    if run.is_complete:
        return f"{out} holds this very run already; nothing was computed again"
    return f"went on in {out}, where {run.n_parts} parts were finished"


def note(message: str) -> None:
    """One line on stderr that is no error."""
    sys.stderr.write(f"dissect: {message}\n")


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
