"""Content hashes of what options name: a run is known by what it read, not by the names of files."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints.hashing import file_hash, stored_hash
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.common.errors import naming
from unlearning.common.hashing import hash_json
from unlearning.common.runs import is_run, read_record
from unlearning.data.chat import ChatFormat
from unlearning.data.records import check_regular
from unlearning.data.sources import read_training_data
from unlearning.evaluation.during_training import benchmark_hash
from unlearning.options import Named, TrainOptions
from unlearning.training.inputs import benchmark_reading
from unlearning.training.output_directory import SEEN, UNREAD, hash_examples


def named_content(options: TrainOptions, *others: Any) -> dict[str, str | None]:
    """Hash what options name.

    Args:
        options: The trainer's options.
        others: Other options, such as the method's.

    Returns:
        By the name of every option that names something: the SHA-256 of the content; None if the option is not set;
        `UNREAD` for a benchmark, whose reading needs the model (see `benchmark_content`); `SEEN` for a directory, set
        or not, since all that is read from it is hashed by itself.

    Raises:
        InputError: A file, a data set or a model is missing or broken; the message names the option.
    """
    found: dict[str, str | None] = {}
    for name, kind, value in _named(options, *others):
        with naming(name):
            is_read = value is not None or kind == "directory"
            found[name] = HASHES[kind](value or "", options) if is_read else None
    return found


def benchmark_content(
    options: TrainOptions, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat | None
) -> dict[str, str]:
    """Hash the data of the benchmark that is run during training, once the model is there.

    Args:
        options: The trainer's options.
        model: The model to train.
        tokenizer: Its tokenizer.
        chat: Chat template that wraps the questions; None for none.

    Returns:
        The hash by the option's name; empty without a benchmark.

    Raises:
        InputError: The benchmark is unknown, or its data is not found.
    """
    if options.benchmark is None:
        return {}
    return {"benchmark": benchmark_hash(options.benchmark, benchmark_reading(options, chat), model, tokenizer)}


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """Hash a tokenizer: its tokens, those that it adds and those that end a text, and with `chat` its chat template."""
    added = tokenizer("a")["input_ids"]
    template = tokenizer.chat_template if chat else None
    return hash_json([sorted(tokenizer.get_vocab().items()), added, tokenizer.eos_token_id, template])


def _named(*groups: Any) -> Iterator[tuple[str, Named, str | None]]:
    """Yield name, kind and value of every option that names something."""
    for options in groups:
        for field in dataclasses.fields(options):
            kind = field.metadata.get("names")
            if kind is not None:
                yield field.name, kind, getattr(options, field.name)


def _file(name: str, _options: TrainOptions) -> str:
    check_regular(Path(name))
    return file_hash(Path(name))


def _data(name: str, options: TrainOptions) -> str | None:
    return hash_examples(read_training_data(name, data_dir=options.data_dir).examples)


def _model(name: str, _options: TrainOptions) -> str:
    return stored_hash(locate_checkpoint(name))


def _control(name: str, options: TrainOptions) -> str:
    path = Path(name)
    if not is_run(path):
        return _model(name, options)
    results = path / "results.parquet"
    return hash_json([read_record(path)["configuration"], file_hash(results) if results.is_file() else None])


HASHES: dict[Named, Callable[[str, TrainOptions], str | None]] = {
    "file": _file,
    "data": _data,
    "model": _model,
    "control": _control,
    "benchmark": lambda _name, _options: UNREAD,
    "directory": lambda _name, _options: SEEN,
}
"""How the content of each kind is hashed; called with the option's value and the trainer's options."""
