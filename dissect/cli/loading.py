"""Load the models and prompts that the options name. Errors that need no model are raised before models are loaded."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dissect import zoo
from dissect.cli.options import ModelOptions, PairOptions, PromptOptions
from unlearning.common.errors import InputError
from unlearning.common.terminal import tell, unescaped

if TYPE_CHECKING:
    from dissect.behaviour.prompts import Reading
    from dissect.models.model import Model
    from dissect.models.pair import ModelPair
    from dissect.prompts.prompts import Prompts
    from dissect.runtime.processes import Processes


def find_data(data: Path | None, base: str) -> Path:
    """Return the file of forget prompts, and check that it can be read.

    Args:
        data: File that the user named, or None for the forget set of a built-in pair.
        base: Name of the base model.

    Returns:
        Path of the file.

    Raises:
        InputError: There is no such base, no file was named for a model that is not built in, or the file cannot be
            read.
    """
    if data is None:
        if base not in zoo.BUILTIN:
            from unlearning.checkpoints.locate import locate_offline

            with _naming("--base"):
                locate_offline(base)  # a misspelt name is the reason why the data are missed
            raise InputError("--data is missing: name a file of prompts with answers (.json or .jsonl)")
        data = zoo.default_prompts(base.partition(":")[0])
    check_data("--data", data)
    return data


def check_data(flag: str, file: Path | None) -> None:
    """Check that a file of prompts can be read, unless it is None.

    Args:
        flag: Flag that names the file.
        file: The file.

    Raises:
        InputError: The file cannot be read.
    """
    from unlearning.data.records import read_records

    if file is not None:
        with _naming(flag):
            read_records(file)


@contextmanager
def _naming(flag: str) -> Iterator[None]:
    """Put a flag before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None


def check_one_process(command: str) -> None:
    """Check that a command which runs in one process was not started as several.

    Raises:
        InputError: A launcher started several processes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"dissect {command} runs in one process. Start it without torchrun, or unset WORLD_SIZE.")


def open_pair(
    pair: PairOptions,
    options: ModelOptions,
    processes: "Processes",
    *,
    quiet: bool,
    stream: bool | None = False,
    max_memory: int | None = None,
) -> "ModelPair":
    """Load base and unlearned model.

    Args:
        pair: Names of the models.
        options: How to load them.
        processes: Processes of this launch.
        quiet: Show no progress bar.
        stream: Read weights layer by layer; None if they do not fit in memory.
        max_memory: Memory limit in bytes.

    Returns:
        The pair.
    """
    _silence_transformers()
    from dissect.models.pair import load_pair

    return load_pair(
        pair.base,
        pair.unlearned,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        stream=stream,
        max_memory=max_memory,
        align=pair.align,
        progress=not quiet,
        processes=processes,
    )


def open_control(
    name: str, pair: "ModelPair", options: ModelOptions, *, quiet: bool, align: bool = False
) -> "Model | str | None":
    """Load the control as the pair was loaded.

    Args:
        name: Name of a model, `auto` or `none`.
        pair: The pair, loaded.
        options: How to load the control.
        quiet: Show no progress bar.
        align: Put the control into the base's basis (order, signs and scales).

    Returns:
        The control; `auto` unchanged; None for `none`.
    """
    if name in ("auto", "none"):
        return None if name == "none" else name
    with _naming("--control"):
        return _load_third(name, pair, options, quiet=quiet, align=align)


def open_strangers(names: Sequence[str], pair: "ModelPair", options: ModelOptions, *, quiet: bool) -> "list[Model]":
    """Load language models that never read about the subjects, as the pair was loaded.

    Args:
        names: Names of the models.
        pair: The pair, loaded.
        options: How to load the models.
        quiet: Show no progress bar.

    Returns:
        The models.
    """
    with _naming("--stranger"):
        return [_load_third(name, pair, options, quiet=quiet) for name in names]


def open_donors(
    names: str, pair: "ModelPair", options: ModelOptions, *, quiet: bool, align: bool = False
) -> "list[Model | str]":
    """Load the donors that are models as the pair was loaded.

    Args:
        names: Comma-separated donors.
        pair: The pair, loaded.
        options: How to load the models.
        quiet: Show no progress bar.
        align: Put the models into the base's basis (order, signs and scales).

    Returns:
        Loaded models and names of the other donors, in the given order.
    """
    from dissect.interventions.donors import KINDS

    with _naming("--donor must name other-question, noise or a model"):
        return [
            name if name in ("base", *KINDS) else _load_third(name, pair, options, quiet=quiet, align=align)
            for name in split_names(names)
        ]


def _load_third(name: str, pair: "ModelPair", options: ModelOptions, *, quiet: bool, align: bool = False) -> "Model":
    from dissect.models.alignment import aligned
    from dissect.models.model import load_model

    model = load_model(
        name,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        stream=pair.base.streamed is not None,
        progress=not quiet,
    )
    return aligned(pair.base, model) if align else model


def choose_reading(options: PromptOptions, pair: PairOptions, *, quiet: bool, scoring: str = "answer") -> "Reading":
    """Choose how files of prompts are read: as the options say, else as the unlearned model, or the base, was trained.

    One line on stderr says what was taken from the record of a training run, and one warns where the options ask
    otherwise, or where both models were trained with different wrappings.

    Args:
        options: How to read the files.
        pair: Names of the models.
        quiet: Do not say what was taken from a record.
        scoring: Positions that are scored; `notebook` has its own wrapping.

    Returns:
        How to read the files.

    Raises:
        InputError: The options exclude each other, or the template, or that of a record, is refused.
    """
    from dissect.behaviour.prompts import Reading
    from unlearning.evaluation.trained_wrapping import choose_wrapping

    template = unescaped(options.template)
    answers: Any = options.answers
    if scoring == "notebook":
        return Reading(template, bool(options.chat), answers, options.limit)
    chosen = choose_wrapping(template, options.chat, [pair.unlearned, pair.base])
    if chosen.note is not None and not quiet and os.environ.get("RANK", "0") == "0":
        tell("dissect", chosen.note)
    found = chosen.wrapping
    return Reading(found.template, found.chat, answers, options.limit, found.chat_date)


def open_prompts(
    data: Path,
    pair: "ModelPair",
    reading: "Reading",
    *,
    scoring: Literal["answer", "notebook"] = "answer",
    max_new_tokens: int = 30,
) -> "Prompts":
    """Read, wrap and tokenise the prompts of a file.

    Args:
        data: The file.
        pair: The pair; its base model writes the answers that the file lacks.
        reading: How to read the file.
        scoring: Positions that are scored.
        max_new_tokens: Length of answers that the base model writes, in tokens.

    Returns:
        The prompts.
    """
    from dissect.prompts.loading import load_prompts

    return load_prompts(
        data,
        pair.tokenizer,
        scoring=scoring,
        template=reading.template,
        chat=reading.chat,
        chat_date=reading.chat_date,
        answers=reading.answers,
        answers_from=pair.base,
        max_new_tokens=max_new_tokens,
        limit=reading.limit,
    )


def split_names(text: str) -> list[str]:
    """Return the names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def short_name(model: str) -> str:
    """Return a model's name as part of a directory's name: `demo-npo`, or the last part of a path."""
    return model.replace(":", "-") if model in zoo.BUILTIN else Path(model).name


def _silence_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
