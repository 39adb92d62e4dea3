"""ConceptVectors (2406.11614): was a concept erased from the parameters, and does the model still talk about it?

Intrinsic: each concept's value vector in the base (the paper's vanilla model) and in the unlearned model. Behavioural:
the greedy texts of both models for questions about the concept, for texts about the concept and for unrelated
questions; the unlearned model's text is compared with the base's (BLEU with the base's text as the reference, which
the released code has the other way round; ROUGE-L F1). Causal: noise on the base's vector, one concept at a time and
each from clean weights, should change what the base says about the concept and nothing else.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from unlearning.common.errors import InputError, check_at_least
from unlearning.common.hashing import hash_json
from unlearning.data.concept_vectors import ConceptRecord, is_concept, notebook_prompt
from unlearning.data.records import Record
from unlearning.evaluation.benchmarks.conceptvectors.summary import COMPLETION, QA, UNRELATED, VECTORS, summarise
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Benchmark, Part, Row
from unlearning.evaluation.metrics.concept_vectors import Readout, article_tokens, readout, vector_change
from unlearning.evaluation.metrics.text_similarity import bleu, rouge_l
from unlearning.evaluation.metrics.value_vectors import Place, check_place, down_projections, noised, value_vector
from unlearning.evaluation.subject import Subject

COMPLETION_TEMPLATE = "Please complete the following paragraph: {text}"


@dataclass(frozen=True)
class Concept:
    """One record of the benchmark.

    Attributes:
        name: Name of the concept.
        prompts: Prompts by their set, as the models read them.
        place: Layer and neuron of its value vector; None if the record names none.
        article: Article about the concept; empty if the record has none.
    """

    name: str
    prompts: dict[str, tuple[str, ...]]
    place: Place | None
    article: str


@dataclass(frozen=True, eq=False)
class Base:
    """The model before unlearning, and the texts that it has written.

    Attributes:
        subject: The model.
        said: Its greedy texts by prompt and maximum number of tokens.
    """

    subject: Subject
    said: dict[tuple[str, int], str] = field(default_factory=dict)

    def texts(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return the greedy continuation of each prompt; a prompt is continued only once.

        Args:
            prompts: The prompts.
            max_new_tokens: Maximum number of tokens of a text.

        Returns:
            One text per prompt, in the same order.
        """
        fresh = list(dict.fromkeys(prompt for prompt in prompts if (prompt, max_new_tokens) not in self.said))
        for prompt, text in zip(fresh, continuations(self.subject, fresh, max_new_tokens), strict=True):
            self.said[prompt, max_new_tokens] = text
        return [self.said[prompt, max_new_tokens] for prompt in prompts]


@dataclass(frozen=True)
class _Question:
    """One prompt of one set, and the index of its concept."""

    set: str
    concept: int
    prompt: str
    id: str


def concepts_of(records: Sequence[Record], source: str, *, per_concept: int | None = None) -> list[Concept]:
    """Return the concepts of ConceptVectors' records, with the benchmark's own prompts.

    Args:
        records: Records with `Concept` and `QA`, and optionally `text_completion`, `unrelated_QA`, `Layer`, `Dim` and
            `wikipedia_content`.
        source: File name, for messages.
        per_concept: Use only the first N questions of each set.

    Returns:
        One concept per record, in the same order.

    Raises:
        InputError: A record is no concept, has questions that are no texts, or has only one of `Layer` and `Dim`.
    """
    if per_concept is not None:
        check_at_least("per_concept", per_concept, 1)
    found = []
    for number, record in enumerate(records, start=1):
        where = f"{source}, record {number}"
        if not is_concept(record):
            keys = ", ".join(map(str, record)) or "none"
            raise InputError(f'{where}: must have "Concept" and "QA", as in ConceptVectors, got the keys {keys}')
        concept = ConceptRecord(record, where)
        prompts = {
            QA: tuple(map(notebook_prompt, concept.questions)),
            COMPLETION: tuple(COMPLETION_TEMPLATE.replace("{text}", half) for half in concept.first_halves),
            UNRELATED: tuple(map(notebook_prompt, concept.unrelated_questions)),
        }
        found.append(
            Concept(
                str(concept.name),
                {name: texts[:per_concept] for name, texts in prompts.items()},
                None if concept.vector is None else Place(*concept.vector),
                concept.article,
            )
        )
    return found


def prepare(
    subject: Subject,
    *,
    concepts: Sequence[Concept],
    base: Base,
    vectors: bool = True,
    noise: Sequence[float] = (),
    max_new_tokens: int = 100,
    seed: int = 0,
) -> Benchmark:
    """Make ConceptVectors ready for a model.

    Args:
        subject: The unlearned model.
        concepts: The concepts; see `concepts_of`.
        base: The model before unlearning, which every score compares with.
        vectors: Compare the value vectors that the concepts name.
        noise: Standard deviations of the noise on the base's vectors; the paper's is 0.1.
        max_new_tokens: Maximum number of tokens of a text.
        seed: Random seed of the noise and of the bootstrap.

    Returns:
        The benchmark, with the sets `qa`, `completion`, `unrelated`, `vectors`, and `noise-S` per standard deviation.

    Raises:
        InputError: There is no concept, a vector is outside of a model, the models have different shapes, or noise is
            given without vectors.
    """
    if not concepts:
        raise InputError("`concepts` must hold at least one concept, got none")
    check_at_least("max_new_tokens", max_new_tokens, 1)
    if any(not 0 <= scale < float("inf") for scale in noise):
        raise InputError(f"`noise` must be standard deviations of at least 0, got {','.join(map(str, noise))}")
    placed = [concept for concept in concepts if vectors and concept.place is not None]
    _check_vectors(subject, base.subject, placed)
    if noise and not placed:
        raise InputError(
            "`noise` changes the concepts' vectors, and no record names one (Layer and Dim). Leave it out."
        )
    questions = _questions(concepts)
    encoded = {name: _encoded(subject, asked) for name, asked in questions.items()}

    def score_texts(name: str, places: Sequence[int]) -> list[Row]:
        asked = [questions[name][place] for place in places]
        prompts = [question.prompt for question in asked]
        texts = continuations(subject, prompts, max_new_tokens)
        return _text_rows(concepts, asked, texts, base.texts(prompts, max_new_tokens))

    def score_vectors(places: Sequence[int]) -> list[Row]:
        readouts = readout(base.subject.model), readout(subject.model)
        return [_vector_row(placed[place], base.subject, subject, readouts) for place in places]

    def score_noise(scale: float, places: Sequence[int]) -> list[Row]:
        return _noise_rows(base, concepts, [flat[place] for place in places], scale, max_new_tokens, seed)

    parts = [
        Part(name, list(map(len, encoded[name])), lambda places, name=name: score_texts(name, places))  # type: ignore[misc]
        for name in questions
    ]
    if placed:
        parts.append(Part(VECTORS, [1] * len(placed), score_vectors))
    flat = [question for asked in questions.values() for question in asked if concepts[question.concept] in placed]
    costs = [question.concept for question in flat]  # a concept's prompts together: its vector is changed once
    parts += [
        Part(f"noise-{scale:g}", costs, lambda places, scale=scale: score_noise(scale, places))  # type: ignore[misc]
        for scale in noise
    ]
    without = len(concepts) - len(placed)
    return Benchmark(
        name="conceptvectors",
        configuration={
            "base_sha256": base.subject.sha256,
            "concepts_sha256": hash_json([asdict(concept) for concept in concepts]),
            "vectors": len(placed),
            "noise": list(noise),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
        parts=parts,
        summarise=lambda rows, _control: summarise(rows, noise=noise, vectors=vectors, seed=seed),
        provenance={"base": base.subject.name},
        notes=(f"{without} of {len(concepts)} concepts have no Layer and Dim",) if vectors and without else (),
    )


def continuations(subject: Subject, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Return a model's greedy continuation of each prompt.

    Args:
        subject: The model.
        prompts: The prompts.
        max_new_tokens: Maximum number of tokens of a continuation.

    Returns:
        One text per prompt, in the same order.
    """
    return greedy_answers(
        subject.model, subject.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=max(1, len(prompts))
    )


def _check_vectors(subject: Subject, base: Subject, placed: Sequence[Concept]) -> None:
    for concept in placed:
        assert concept.place is not None
        for model in (base, subject):
            check_place(model.model, concept.place, concept=concept.name, name=model.name)


def _questions(concepts: Sequence[Concept]) -> dict[str, list[_Question]]:
    """Return the prompts by set; sets without prompts are left out."""
    sets: dict[str, list[_Question]] = {QA: [], COMPLETION: [], UNRELATED: []}
    for place, concept in enumerate(concepts):
        for name, prompts in concept.prompts.items():
            sets[name] += [
                _Question(name, place, prompt, f"{concept.name}-{name}-{number}")
                for number, prompt in enumerate(prompts)
            ]
    return {name: asked for name, asked in sets.items() if asked}


def _encoded(subject: Subject, asked: Sequence[_Question]) -> list[list[int]]:
    encoded = [list(subject.tokenizer(question.prompt, verbose=False)["input_ids"]) for question in asked]
    subject.check_tokens(encoded)
    return encoded


def _text_rows(
    concepts: Sequence[Concept], asked: Sequence[_Question], texts: Sequence[str], references: Sequence[str]
) -> list[Row]:
    return [
        {
            "id": question.id,
            "group": concepts[question.concept].name,
            "kind": question.set,
            "prompt": question.prompt,
            "text": text,
            "base_text": before,
            "bleu": bleu(text, before),
            "rouge_l": rouge_l(text, before),
        }
        for question, text, before in zip(asked, texts, references, strict=True)
    ]


def _vector_row(concept: Concept, base: Subject, subject: Subject, readouts: tuple[Readout, Readout]) -> Row:
    place = concept.place
    assert place is not None
    before, after = (value_vector(down_projections(each.model)[place.layer], place.dim) for each in (base, subject))
    article = article_tokens(base.tokenizer, concept.article)
    change = asdict(vector_change(before, after, readouts, article=article))
    promoted = {
        "promotes_unembed": change.pop("promoted"),
        "promotes_unembed_after": change.pop("promoted_after"),
        "promotes_norm_unembed": change.pop("promoted_norm"),
        "promotes_norm_unembed_after": change.pop("promoted_norm_after"),
    }
    texts = {
        name: " | ".join(str(base.tokenizer.decode([token])) for token in tokens[:10])
        for name, tokens in promoted.items()
    }
    return {"id": concept.name, "group": concept.name, **asdict(place), **change, **texts}


def _noise_rows(
    base: Base,
    concepts: Sequence[Concept],
    asked: Sequence[_Question],
    scale: float,
    max_new_tokens: int,
    seed: int,
) -> list[Row]:
    rows: dict[_Question, Row] = {}
    model = base.subject.model
    for number in dict.fromkeys(question.concept for question in asked):
        place = concepts[number].place
        assert place is not None
        mine = [question for question in asked if question.concept == number]
        prompts = [question.prompt for question in mine]
        clean = base.texts(prompts, max_new_tokens)
        vector = value_vector(down_projections(model)[place.layer], place.dim)
        with noised(vector, scale=scale, seed=[seed, place.layer, place.dim]):
            texts = continuations(base.subject, prompts, max_new_tokens)
        rows |= zip(mine, _text_rows(concepts, mine, texts, clean), strict=True)
    return [rows[question] for question in asked]
