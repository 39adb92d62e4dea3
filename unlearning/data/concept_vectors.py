"""ConceptVectors (2406.11614): per concept an encyclopedia article, questions about it, and texts in two halves.

Locally: the JSON files under `conceptvectors`, such as the Dissecting paper's `llama2-7b_concepts_test_...json`.
"""

from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError, nearest
from unlearning.data.documents import pack_sentences
from unlearning.data.hub import download, local_directory
from unlearning.data.named import Found
from unlearning.data.records import Record, read_records

NOTEBOOK_TEMPLATE = "Question: {question}\n Answer:"
"""The prompt of the released notebooks and of ConceptVectors: the question verbatim, a space before `Answer:`."""

REPOSITORY = "YihuaiHong/ConceptVectors"
PARTS = ("wiki", "wiki-released", "qa", "completion")

_DIRECTORIES = ("conceptvectors", "ConceptVectors", "ConceptVectors_data")


def read(name: str, data_dir: Path | None) -> Found:
    """The records of `part` or `part:concept`.

    Args:
        name: `wiki` (paragraphs of the articles), `wiki-released` (the same without a space between sentences, as
            the published code makes them), `qa` (questions with the released answers) or `completion` (texts in two
            halves), all of them or one concept's.
        data_dir: may hold the files.

    Raises:
        InputError: there is no such part or concept, a record lacks the part, or the files are neither here nor on
            the hub.
    """
    part, _, concept = name.partition(":")
    if part not in PARTS:
        hint = nearest(part, PARTS) or ";"
        raise InputError(f"conceptvectors:{name}: no part {part!r}{hint} there are {', '.join(PARTS)}")
    places = find_concepts(data_dir)
    if concept and concept not in places:
        known = sorted(places)
        raise InputError(f"conceptvectors:{name}: no such concept{nearest(concept, known) or ';'} {', '.join(known)}")
    chosen = [places[concept]] if concept else [places[key] for key in sorted(places)]
    source = ", ".join(sorted({str(file) for _, file in chosen}))
    return records_of(part, [record for record, _ in chosen], source)


def find_concepts(data_dir: Path | None) -> dict[str, tuple[Record, Path]]:
    """Every concept's record and the file that it is in, by the concept's name.

    Args:
        data_dir: may hold the files; otherwise they come from the hub.

    Raises:
        InputError: there is no file of concepts.
    """
    directory = local_directory(_DIRECTORIES, data_dir)
    if directory is None:
        directory = download(REPOSITORY, ["ConceptVectors_data/*_concepts.json"])
    files = sorted(directory.rglob("*.json"))
    if not files:
        raise InputError(f"conceptvectors: no .json file in {directory}; put the concepts' file there")
    return {
        str(record["Concept"]): (record, file)
        for file in reversed(files)  # of a concept in two files, the first one counts
        for record in read_records(file)
        if is_concept(record)
    }


def is_concept(record: Record) -> bool:
    """Whether a record is one of ConceptVectors'."""
    return "Concept" in record and "QA" in record


def records_of(part: str, concepts: list[Record], source: str) -> Found:
    """One part of concepts, as plain records.

    Raises:
        InputError: a concept lacks it.
    """
    make = {"wiki": _paragraphs, "wiki-released": _released_paragraphs, "qa": _questions, "completion": _halves}[part]
    records = []
    for concept in concepts:
        where = f"{source}, concept {concept['Concept']!r}"
        records += make(concept, where)
    template = NOTEBOOK_TEMPLATE if part == "qa" else Found.template
    return Found(records, source, template)


def _paragraphs(concept: Record, where: str, separator: str = " ") -> list[Record]:
    article = concept.get("wikipedia_content")
    if not isinstance(article, str) or not article.strip():
        raise InputError(f"{where}: there is no article under wikipedia_content")
    return [{"text": paragraph} for paragraph in pack_sentences(article, separator=separator)]


def _released_paragraphs(concept: Record, where: str) -> list[Record]:
    return _paragraphs(concept, where, separator="")


def _questions(concept: Record, where: str) -> list[Record]:
    questions, rows = concept["QA"], concept.get("QA_with_answers")
    if not isinstance(rows, list):
        raise InputError(f"{where}: there are no answers (QA_with_answers) to its questions; use the wiki part")
    if not isinstance(questions, list) or len(rows) != len(questions):
        raise InputError(f"{where}: QA_with_answers is not a list with one entry per question of QA")
    return [
        {"question": question, "answer": _released_answer(question, row, f"{where}, question {index}")}
        for index, (question, row) in enumerate(zip(questions, rows, strict=True))
    ]


def _released_answer(question: Any, row: Any, where: str) -> str:
    prompt = NOTEBOOK_TEMPLATE.replace("{question}", str(question))
    if not str(row).startswith(prompt):
        raise InputError(f"{where}: QA_with_answers is not question + answer")
    return cut_continuation(str(row)[len(prompt) :])


def _halves(concept: Record, where: str) -> list[Record]:
    texts = concept.get("text_completion")
    halves = ("First_half", "Second_half")
    if not isinstance(texts, list) or not all(isinstance(t, dict) and all(h in t for h in halves) for t in texts):
        raise InputError(f"{where}: text_completion is not a list of First_half and Second_half")
    return [{"prompt": text["First_half"], "answer": text["Second_half"]} for text in texts]


def cut_continuation(text: str) -> str:
    """A model's own continuation up to its first line break or its next `Question:`, without outer white space.

    Continuations run on into further invented questions in half of the released OLMo rows; they are no part of
    the answer.
    """
    return text.strip().split("\n")[0].split("Question:")[0].strip()
