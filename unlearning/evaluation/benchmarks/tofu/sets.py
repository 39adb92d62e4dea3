"""TOFU's four sets of questions: forget, retain, real authors, world facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError, check_at_least, nearest
from unlearning.common.places import is_there
from unlearning.data import tofu
from unlearning.data.named import data_directory, read_file
from unlearning.data.question_answer import bare, label_of
from unlearning.data.records import Record

RETAIN = "retain_perturbed"
"""TOFU's 400 questions about the first 20 authors, which no forget split up to forget90 contains."""

SETS = ("forget", "retain", "real_authors", "world_facts")

_OPTIONAL = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        question: Question, as in training.
        answer: Answer, as in training.
        paraphrased_question: The question in other words; None if the set has none.
        paraphrased_answer: The answer in other words; None if the set has none.
        perturbed_answers: Wrong answers of the same form; empty if the set has none.
        id: Identifier of the row.
        group: Author, whom the bootstrap draws whole; "" if the row stands alone.
    """

    question: str
    answer: str
    paraphrased_question: str | None
    paraphrased_answer: str | None
    perturbed_answers: tuple[str, ...]
    id: str
    group: str


@dataclass(frozen=True)
class QuestionSet:
    """One of the four sets.

    Attributes:
        name: One of forget, retain, real_authors and world_facts.
        label: Name of the split, or of the file.
        source: Files that the questions come from.
        questions: The questions, in the order of the source.
    """

    name: str
    label: str
    source: str
    questions: list[Question]


def read_sets(
    forget: str | Path = "forget10",
    *,
    retain: str | Path = RETAIN,
    names: Sequence[str] = SETS,
    data_dir: str | Path | None = None,
    limit: int | None = None,
) -> list[QuestionSet]:
    """Read the four sets, or some of them.

    Args:
        forget: A split, forget01 to forget99, or a file with records of the same shape, whose `group` or `author` the
            bootstrap draws whole.
        retain: A split or such a file.
        names: Names of `SETS`; the forget set is always read.
        data_dir: Directory that holds `tofu/`; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N rows of each set.

    Returns:
        The sets, in the order of `SETS`.

    Raises:
        InputError: A set or split is unknown, is neither local nor on the hub, or has records of another shape, or
            questions are in both the forget and the retain set.
    """
    if limit is not None:
        check_at_least("limit", limit, 1)
    for name in names:
        if name not in SETS:
            hint = nearest(name, SETS)
            raise InputError(f"`sets` must be among {', '.join(SETS)}, got {name!r}{hint}")
    directory = data_directory(data_dir)
    sources = dict(zip(SETS, (forget, retain, "real_authors_perturbed", "world_facts_perturbed"), strict=True))
    sets = {
        name: _read(name, source, directory, limit)
        for name, source in sources.items()
        if name == "forget" or name in names
    }
    if "retain" in sets:
        _refuse_shared(sets["forget"], sets["retain"])
    return list(sets.values())


def _refuse_shared(forget: QuestionSet, retain: QuestionSet) -> None:
    forgotten = {(question.question, question.answer) for question in forget.questions}
    shared = sum((question.question, question.answer) in forgotten for question in retain.questions)
    if shared:
        raise InputError(
            f"{shared} questions of {retain.label} are in {forget.label}, too. Give `retain` questions that are not to "
            "be forgotten."
        )


def read_questions(records: Sequence[Record], *, source: str, authors_in_order: bool = False) -> list[Question]:
    """Check records and return their questions.

    Args:
        records: Records with `question` and `answer`. `paraphrased_question`, `paraphrased_answer` and
            `perturbed_answer` (a list of texts) are optional, but either all records have them or none.
        source: File name, for messages.
        authors_in_order: Every twenty successive rows belong to one author, as in TOFU's own files.

    Returns:
        One question per record, in the same order.

    Raises:
        InputError: A record has another shape; the message names it.
    """
    optional = [key for key in _OPTIONAL if any(record.get(key) is not None for record in records)]
    questions = []
    for place, record in enumerate(records):
        where = f"{source}, record {place + 1}"
        texts = {key: _texts(record, key, where, others_have_it=key in optional) for key in ("question", "answer")}
        texts |= {key: _texts(record, key, where, others_have_it=True) for key in optional}
        if bare(texts["answer"][0]) in map(bare, texts.get("perturbed_answer", ())):
            raise InputError(f"{where}: the answer is also among the perturbed ones; remove it there")
        named = next((key for key in ("group", "author") if record.get(key) is not None), None)
        questions.append(
            Question(
                question=texts["question"][0],
                answer=texts["answer"][0],
                paraphrased_question=next(iter(texts.get("paraphrased_question", ())), None),
                paraphrased_answer=next(iter(texts.get("paraphrased_answer", ())), None),
                perturbed_answers=texts.get("perturbed_answer", ()),
                id=label_of(record, "id", where, str(place)),
                group=label_of(record, named, where) if named else tofu.author(place) if authors_in_order else "",
            )
        )
    return questions


def _read(name: str, source: str | Path, directory: Path | None, limit: int | None) -> QuestionSet:
    label = str(source).removeprefix("tofu:")
    is_file = Path(source).suffix != "" or is_there(source)
    if is_file:
        label, files, records = Path(source).name, str(source), read_file(Path(source))
    else:
        found = tofu.read_perturbed(label, directory)
        files, records = ", ".join((found.source, *found.notes)), found.records
    questions = read_questions(records, source=files, authors_in_order=not is_file and name in ("forget", "retain"))
    return QuestionSet(name, label, files, questions[:limit])


def _texts(record: Record, key: str, where: str, *, others_have_it: bool) -> tuple[str, ...]:
    """Return the text under a key as a tuple of one; for perturbed answers, all of them."""
    value = record.get(key)
    if value is None:
        keys = ", ".join(record) or "none"
        rest = ", which other records have; add it, or leave the record out" if others_have_it else ""
        raise InputError(f"{where}: no {key}{rest or f'; its keys are {keys}, and question and answer are needed'}")
    texts = tuple(value) if key == "perturbed_answer" and isinstance(value, list) else (value,)
    if not texts:
        raise InputError(f"{where}: {key} is an empty list; give wrong answers, or leave the record out")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        what = "texts that are not empty" if key == "perturbed_answer" else "a text that is not empty"
        raise InputError(f"{where}: {key} should be {what}")
    return texts
