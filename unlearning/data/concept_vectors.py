"""ConceptVectors (2406.11614): per concept an encyclopedia article, questions about it, texts in two halves, a vector.

The only parser of this benchmark's JSON. Locally: the JSON files under `conceptvectors`, such as the Dissecting paper's
`llama2-7b_concepts_test_...json`. A record has the keys

    Concept             name of the concept
    Layer, Dim          its value vector: a layer, and a column of that layer's down projection
    QA                  questions about the concept
    QA_with_answers     per question one text: prompt and a model's continuation (only in the Dissecting paper's files)
    answers_tokens_num  per question the number of tokens of that continuation (only there)
    text_completion     texts about the concept, each as `First_half` and `Second_half`
    unrelated_QA        questions about other concepts
    wikipedia_content   the article
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError, nearest
from unlearning.data.documents import pack_sentences
from unlearning.data.hub import download, local_directory
from unlearning.data.named import Found
from unlearning.data.question_answer import check_length
from unlearning.data.records import Record, read_records

NOTEBOOK_TEMPLATE = "Question: {question}\n Answer:"
"""The prompt of the released notebooks and of ConceptVectors: the question verbatim, a space before `Answer:`."""

REPOSITORY = "YihuaiHong/ConceptVectors"
PARTS = ("wiki", "wiki-released", "qa", "completion")

_DIRECTORIES = ("conceptvectors", "ConceptVectors", "ConceptVectors_data")


def has_questions(record: Record) -> bool:
    """Return whether a record holds ConceptVectors' questions."""
    return "QA" in record


def is_concept(record: Record) -> bool:
    """Return whether a record is a whole concept: questions under the concept's name."""
    return "Concept" in record and has_questions(record)


@dataclass(frozen=True)
class ConceptRecord:
    """One record of ConceptVectors' JSON.

    A property checks its keys when it is read, so that a file needs only the keys that its user reads. Every property
    raises InputError if its keys hold something else than this docstring says.

    Attributes:
        fields: The record as it was read.
        where: File and record, for messages.
    """

    fields: Record
    where: str

    @property
    def name(self) -> str | None:
        """The concept's name; None if the record has none."""
        name = self.fields.get("Concept")
        if "Concept" in self.fields and not (isinstance(name, str) and name.strip()):
            raise InputError(f"{self.where}: Concept must be the concept's name, got {type(name).__name__}")
        return name

    @property
    def vector(self) -> tuple[int, int] | None:
        """Layer and dimension of the concept's value vector; None if the record has neither."""
        layer, dim = (self.fields.get(key) for key in ("Layer", "Dim"))
        if layer is None and dim is None:
            return None
        if not (_is_index(layer) and _is_index(dim)):
            raise InputError(
                f"{self.where}: Layer {layer!r} and Dim {dim!r} name no value vector; give two whole numbers, or "
                "neither"
            )
        return layer, dim  # type: ignore[return-value]  # checked above

    @property
    def questions(self) -> list[str]:
        """The questions about the concept, verbatim."""
        questions = self._texts("QA", self.fields.get("QA"))
        if not questions:
            raise InputError(f"{self.where}: QA is an empty list; give questions, or remove the record")
        return questions

    @property
    def questions_with_answers(self) -> list[str] | None:
        """Per question one text of prompt and released continuation; None if the file has none."""
        texts = self._per_question("QA_with_answers")
        if texts is None:
            return None
        for index, (text, question) in enumerate(
            zip(self._texts("QA_with_answers", texts), self.questions, strict=True)
        ):
            if not text.startswith(notebook_prompt(question)):
                raise InputError(f"{self.where}, question {index}: QA_with_answers is not question + answer")
        return texts

    @property
    def answer_lengths(self) -> list[int] | None:
        """Per question the number of tokens of the released continuation; None if the file has none."""
        lengths = self._per_question("answers_tokens_num")
        if lengths is not None and not all(map(_is_index, lengths)):
            raise InputError(f"{self.where}: answers_tokens_num must be a list of whole numbers")
        return lengths

    @property
    def answers(self) -> list[str] | None:
        """Per question the released answer (see `cut_continuation`), which may be empty; None if the file has none."""
        texts = self.questions_with_answers
        if texts is None:
            return None
        pairs = zip(self.questions, texts, strict=True)
        return [cut_continuation(text[len(notebook_prompt(question)) :]) for question, text in pairs]

    @property
    def first_halves(self) -> list[str]:
        """First halves of the texts about the concept, also of those that lack the second; empty without texts."""
        texts = self.fields.get("text_completion") or []
        if isinstance(texts, list):
            texts = [text.get("First_half") if isinstance(text, dict) else None for text in texts]
        return self._texts("text_completion's First_half", texts)

    @property
    def halves(self) -> list[tuple[str, str]]:
        """Both halves of every text about the concept; empty without texts. A record may itself be such a text."""
        texts = [self.fields] if "First_half" in self.fields else self.fields.get("text_completion") or []
        keys = ("First_half", "Second_half")
        if not isinstance(texts, list) or not all(
            isinstance(text, dict) and all(isinstance(text.get(key), str) for key in keys) for text in texts
        ):
            raise InputError(f"{self.where}: text_completion must be a list of First_half and Second_half")
        return [(text["First_half"], text["Second_half"]) for text in texts]

    @property
    def unrelated_questions(self) -> list[str]:
        """Questions about other concepts; empty without any."""
        return self._texts("unrelated_QA", self.fields.get("unrelated_QA") or [])

    @property
    def article(self) -> str:
        """The encyclopedia article about the concept; empty if there is none."""
        article = self.fields.get("wikipedia_content")
        if article is not None and not isinstance(article, str):
            raise InputError(f"{self.where}: wikipedia_content must be text, got {type(article).__name__}")
        return article or ""

    def _texts(self, key: str, values: Any) -> list[str]:
        if not isinstance(values, list) or not all(isinstance(value, str) and value.strip() for value in values):
            raise InputError(f"{self.where}: {key} must be a list of texts, none of them empty")
        for text in values:
            check_length(text, key, self.where)
        return values

    def _per_question(self, key: str) -> list[Any] | None:
        values = self.fields.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != len(self.questions)):
            raise InputError(f"{self.where}: {key} must be a list with one entry per question of QA")
        return values


def notebook_prompt(question: str) -> str:
    """Return the released notebooks' prompt for a question."""
    return NOTEBOOK_TEMPLATE.replace("{question}", question)


def cut_continuation(text: str) -> str:
    """Cut a model's continuation at its first line break or its next `Question:`, and strip white space.

    Half of the released OLMo rows run on into further, invented questions, which are no part of the answer.

    Args:
        text: The continuation.

    Returns:
        The answer; may be empty.
    """
    return text.strip().split("\n")[0].split("Question:")[0].strip()


def read(name: str, data_dir: Path | None) -> Found:
    """Read one part of all concepts or of one, as training records.

    Args:
        name: `part` or `part:concept`. The parts are `wiki` (paragraphs of the articles), `wiki-released` (the same
            without a space between sentences, as the published code makes them), `qa` (questions with the released
            answers) and `completion` (texts in two halves).
        data_dir: Directory of data sets; the hub is asked for what it lacks.

    Returns:
        The records, concepts in the order of their names.

    Raises:
        InputError: The part or the concept does not exist, a record lacks the part, or the files are neither in the
            directory nor on the hub.
    """
    part, _, concept = name.partition(":")
    if part not in PARTS:
        hint = nearest(part, PARTS) or ";"
        raise InputError(f"conceptvectors:{name}: no part {part!r}{hint} there are {', '.join(PARTS)}")
    concepts = find_concepts(data_dir)
    if concept and concept not in concepts:
        known = sorted(concepts)
        raise InputError(f"conceptvectors:{name}: no such concept{nearest(concept, known) or ';'} {', '.join(known)}")
    chosen = [concepts[concept]] if concept else [concepts[key] for key in sorted(concepts)]
    source = ", ".join(sorted({str(file) for _, file in chosen}))
    return records_of(part, [record for record, _ in chosen], source)


def find_concepts(data_dir: Path | None) -> dict[str, tuple[Record, Path]]:
    """Find every concept in the files of a directory of data sets, or else in those of the hub.

    Args:
        data_dir: Directory of data sets.

    Returns:
        By the concept's name, its record and the file that holds it; of a concept in two files, the first file's.

    Raises:
        InputError: The directory of concepts holds no .json file, or the hub cannot be reached.
    """
    directory = local_directory(_DIRECTORIES, data_dir)
    if directory is None:
        directory = download(REPOSITORY, ["ConceptVectors_data/*_concepts.json"])
    files = sorted(directory.rglob("*.json"))
    if not files:
        raise InputError(f"conceptvectors: no .json file in {directory}; put the concepts' file there")
    return {
        ConceptRecord(record, f"{file}, record {number}").name or "": (record, file)
        for file in reversed(files)  # later entries win, and the first file is to win
        for number, record in enumerate(read_records(file), start=1)
        if is_concept(record)
    }


def records_of(part: str, concepts: list[Record], source: str) -> Found:
    """Turn one part of concepts into training records.

    Args:
        part: One of `PARTS`.
        concepts: ConceptVectors' records.
        source: Name of their files, for messages.

    Returns:
        Records with `text`, `question` and `answer`, or `prompt` and `answer`, and the template of their questions.

    Raises:
        InputError: A concept lacks the part.
    """
    make = {"wiki": _paragraphs, "wiki-released": _released_paragraphs, "qa": _questions, "completion": _halves}[part]
    records = []
    for fields in concepts:
        records += make(ConceptRecord(fields, f"{source}, concept {fields['Concept']!r}"))
    template = NOTEBOOK_TEMPLATE if part == "qa" else Found.template
    return Found(records, source, template)


def _paragraphs(concept: ConceptRecord, separator: str = " ") -> list[Record]:
    if not concept.article.strip():
        raise InputError(f"{concept.where}: there is no article under wikipedia_content")
    return [{"text": paragraph} for paragraph in pack_sentences(concept.article, separator=separator)]


def _released_paragraphs(concept: ConceptRecord) -> list[Record]:
    return _paragraphs(concept, separator="")


def _questions(concept: ConceptRecord) -> list[Record]:
    answers = concept.answers
    if answers is None:
        raise InputError(f"{concept.where}: there are no answers (QA_with_answers) to its questions; use the wiki part")
    pairs = zip(concept.questions, answers, strict=True)
    return [{"question": question, "answer": answer} for question, answer in pairs]


def _halves(concept: ConceptRecord) -> list[Record]:
    if concept.fields.get("text_completion") is None:
        raise InputError(f"{concept.where}: there are no texts under text_completion")
    return [{"prompt": first, "answer": second} for first, second in concept.halves]


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
