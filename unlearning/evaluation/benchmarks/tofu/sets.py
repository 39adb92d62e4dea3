"""TOFU's four sets of questions: forget, retain, real authors, world facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError, nearest
from unlearning.data import tofu
from unlearning.data.named import data_directory, read_file
from unlearning.data.records import Record

RETAIN = "retain_perturbed"
"""TOFU's 400 questions about the first 20 authors, which every forget split up to forget90 leaves in."""

SETS = ("forget", "retain", "real_authors", "world_facts")

_OPTIONAL = ("paraphrased_question", "paraphrased_answer", "perturbed_answer")


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        question, answer: as they were trained.
        paraphrased_question, paraphrased_answer: the same in other words; None where the set has none.
        perturbed_answers: wrong answers of the same form; none where the set has none.
        id: of the row.
        group: the author; "" where the row stands alone.
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
        name: forget, retain, real_authors or world_facts.
        label: the split's name, or the file's.
        source: the files.
        questions: in the order of the source.
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
        forget: a split, forget01 to forget99, or a file with records of the same shape, whose `group` or `author` is
            what the bootstrap draws whole.
        retain: likewise.
        names: which of `SETS`; the forget set is always among them.
        data_dir: holds `tofu/`; None reads $DISSECT_DATA, then the hub.
        limit: use the first so many rows of each set.

    Raises:
        InputError: what `read_questions` raises, an unknown set or split, a set that is neither here nor on the hub,
            or questions that are in the forget and in the retain set.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: 1 or more")
    for name in names:
        if name not in SETS:
            raise InputError(f"--sets {name}: no such set{nearest(name, SETS) or ';'} there are {', '.join(SETS)}")
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
            f"{shared} questions of {retain.label} are in {forget.label}, too; name questions that are not to be "
            "forgotten with --retain"
        )


def read_questions(records: Sequence[Record], *, source: str, authors_in_order: bool = False) -> list[Question]:
    """Check records and take from them what the benchmark asks.

    Args:
        records: `question` and `answer`; and either all or none of them `paraphrased_question`, likewise
            `paraphrased_answer`, and `perturbed_answer`, a list of texts.
        source: for messages.
        authors_in_order: twenty rows in succession are one author's, as in TOFU's own files.

    Raises:
        InputError: a record is of another shape (which one).
    """
    optional = [key for key in _OPTIONAL if any(record.get(key) is not None for record in records)]
    questions = []
    for place, record in enumerate(records):
        where = f"{source}, record {place + 1}"
        texts = {key: _texts(record, key, where, others_have_it=key in optional) for key in ("question", "answer")}
        texts |= {key: _texts(record, key, where, others_have_it=True) for key in optional}
        group = record.get("group", record.get("author"))
        questions.append(
            Question(
                question=texts["question"][0],
                answer=texts["answer"][0],
                paraphrased_question=next(iter(texts.get("paraphrased_question", ())), None),
                paraphrased_answer=next(iter(texts.get("paraphrased_answer", ())), None),
                perturbed_answers=texts.get("perturbed_answer", ()),
                id=str(record.get("id", place)),
                group=str(group) if group is not None else tofu.author(place) if authors_in_order else "",
            )
        )
    return questions


def _read(name: str, source: str | Path, directory: Path | None, limit: int | None) -> QuestionSet:
    label = str(source).removeprefix("tofu:")
    is_file = Path(source).suffix != "" or Path(source).exists()
    if is_file:
        label, files, records = Path(source).name, str(source), read_file(Path(source))
    else:
        found = tofu.read_perturbed(label, directory)
        files, records = ", ".join((found.source, *found.notes)), found.records
    questions = read_questions(records, source=files, authors_in_order=not is_file and name in ("forget", "retain"))
    return QuestionSet(name, label, files, questions[:limit])


def _texts(record: Record, key: str, where: str, *, others_have_it: bool) -> tuple[str, ...]:
    """A text, or several where perturbed answers are."""
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
