"""Examples by the name of their source: local files, named data sets, and data sets on the hub."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from unlearning.common.errors import InputError, nearest
from unlearning.common.places import is_directory, is_there
from unlearning.data import concept_vectors, hub, muse, tofu, wmdp
from unlearning.data.alternates import match_alternates
from unlearning.data.chat import ChatFormat
from unlearning.data.documents import pack_sentences
from unlearning.data.named import Found, data_directory, read_file, read_files
from unlearning.data.question_answer import Example, Wrapping, examples_of, texts_of, unused_template
from unlearning.data.records import Record

NAMED: dict[str, Callable[[str, Path | None], Found]] = {
    "tofu": tofu.read,
    "muse-news": partial(muse.read, "News"),
    "muse-books": partial(muse.read, "Books"),
    "wmdp": wmdp.read,
    "conceptvectors": concept_vectors.read,
    "hub": lambda name, _data_dir: _read_hub(name),
}
"""Readers of named data sets, by the word before the first colon of a name."""

ALTERNATE_KEYS = ("alternate", "alternates", "perturbed_answer")
"""Keys under which a record with an answer holds alternates to it: one text, or a list of texts."""


@dataclass(frozen=True)
class TrainingData:
    """Examples and their source.

    Attributes:
        examples: In the order of the source.
        source: Name that was given, and the files it stands for.
        notes: Counts, and what was left out; one line each.
    """

    examples: list[Example]
    source: str
    notes: tuple[str, ...]


def read_training_data(
    source: str | Path,
    *,
    template: str | None = None,
    chat: ChatFormat | None = None,
    data_dir: str | Path | None = None,
    pack: int | None = None,
) -> TrainingData:
    """Read forget or retain data of any known format.

    Args:
        source: A file (.json, .jsonl, .csv, .tsv, .parquet, .txt), a directory of text files, or a name:
            `tofu:forget05`, `muse-news:raw:forget`, `muse-books:knowmem:retain_qa`, `wmdp:bio-retain`,
            `conceptvectors:wiki:CONCEPT`, `hub:owner/name:config:split`.
        template: Text around questions, with `{question}`; None takes the data set's own.
        chat: Chat template that wraps questions and prompts instead.
        data_dir: Directory of named data sets, asked before the hub; None takes $DISSECT_DATA.
        pack: Cut documents into paragraphs of whole sentences longer than this number of characters; None cuts nothing.

    Returns:
        The examples, their source and notes.

    Raises:
        InputError: The name is unknown (the message proposes the nearest known one), a file is missing or broken (the
            message names the line or record), or the data is neither in `data_dir` nor on the hub.
    """
    if template is not None and chat is not None:
        raise InputError("`template` and `chat` cannot be used together: both wrap the question; leave one of them out")
    found = find_records(source, data_dir)
    wrapping = Wrapping(template or found.template, chat)
    examples = examples_of(found.records, wrapping, source=found.source)
    if not examples:
        raise InputError(f"{source}: no example in it has any text; name other data")
    notes = list(found.notes)
    if (unused := unused_template(found.records, template)) is not None:
        notes.append(unused)
    if len(examples) < len(found.records):
        notes.append(f"{len(found.records) - len(examples)} of {len(found.records)} documents are empty and left out")
    if pack is not None:
        examples = _packed(examples, pack)
    n_documents = sum(not example.prompt for example in examples)
    kinds = [(len(examples) - n_documents, "prompts with answers"), (n_documents, "documents")]
    notes.append(", ".join(f"{n} {kind}" for n, kind in kinds if n))
    name = str(source)
    return TrainingData(examples, name if name == found.source else f"{name}: {found.source}", tuple(notes))


def read_alternates(
    source: str | Path,
    forget: list[Example],
    *,
    template: str | None = None,
    chat: ChatFormat | None = None,
    data_dir: str | Path | None = None,
) -> list[list[str]]:
    """Read the alternate answers of each forget example, from any source of prompts and answers.

    A record's alternates stand under one of `ALTERNATE_KEYS` (such as TOFU's perturbed answers); without these keys its
    answer is the alternate.

    Args:
        source: A source of `read_training_data`; give the wrapping of the forget data.
        forget: The forget examples.
        template: Text around questions, with `{question}`; None takes the data set's own.
        chat: Chat template that wraps questions and prompts instead.
        data_dir: Directory of named data sets, asked before the hub; None takes $DISSECT_DATA.

    Returns:
        For each forget example its alternate answers, at least one.

    Raises:
        InputError: The source cannot be read (see `read_training_data`), or a forget example has no alternate or its
            own answer as one (see `match_alternates`).
    """
    found = find_records(source, data_dir)
    records = [
        alternate
        for number, record in enumerate(found.records, start=1)
        for alternate in _alternates(record, f"{found.source}, record {number}")
    ]
    alternates = examples_of(records, Wrapping(template or found.template, chat), source=found.source)
    return match_alternates(alternates, forget, source=str(source))


def find_records(source: str | Path, data_dir: str | Path | None = None) -> Found:
    """Read the records of a source, before anything is wrapped.

    Args:
        source: A source of `read_training_data`.
        data_dir: Directory of named data sets, asked before the hub; None takes $DISSECT_DATA.

    Returns:
        The records, their source, and the template of their questions.

    Raises:
        InputError: The name is unknown, a file is missing or broken, or the data is neither in `data_dir` nor on the
            hub.
    """
    name = str(source)
    prefix, colon, rest = name.partition(":")
    if colon and not is_there(source):
        if prefix in NAMED:
            return NAMED[prefix](rest, data_directory(data_dir))
        hint = nearest(prefix, NAMED) or ";"
        raise InputError(f"{name}: no such file, and no data set {prefix!r}{hint} there are {', '.join(NAMED)}")
    records = read_file(Path(source))
    if all(map(concept_vectors.is_concept, records)):
        found = concept_vectors.records_of("wiki", records, name)
        note = f"the articles of {len(records)} concepts; conceptvectors:qa and :completion are their other parts"
        return Found(found.records, found.source, found.template, (note,))
    return Found(records, name)


def _read_hub(name: str) -> Found:
    part = hub.read_name(name)
    local = Path(part.repository)
    files = hub.find_files(part, local if is_directory(local) else None)
    return Found(read_files(files), f"{part.repository} ({', '.join(file.name for file in files)})")


def _packed(examples: list[Example], longer_than: int) -> list[Example]:
    packed = []
    for example in examples:
        if example.prompt:
            packed.append(example)
        else:
            packed += [Example("", text) for text in pack_sentences(example.answer, longer_than=longer_than)]
    return packed


def _alternates(record: Record, where: str) -> list[Record]:
    key = next((key for key in ALTERNATE_KEYS if key in record), None)
    if key is None:
        return [record]
    return [{**record, "answer": value} for value in texts_of(record, key, where)]
