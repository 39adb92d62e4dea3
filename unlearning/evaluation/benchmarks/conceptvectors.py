"""ConceptVectors (2406.11614): was a concept erased from the parameters, and does the model still talk about it?

Intrinsic: each concept's value vector in the vanilla and in the unlearned model. Behavioural: what both say, greedily,
to questions about the concept, to texts about it and to unrelated questions; the unlearned model's text is compared
with the vanilla model's own (BLEU with the vanilla text as the reference, which the released code has the other way
round; ROUGE-L F1). Causal: noise on the vanilla model's vector, one concept at a time and each from clean weights,
should change what it says of the concept and nothing else.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from unlearning.common.errors import InputError
from unlearning.common.hashing import hash_json
from unlearning.data.concept_vectors import ConceptRecord, is_concept, notebook_prompt
from unlearning.data.records import Record
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Benchmark, Part, Row, Rows
from unlearning.evaluation.metrics.concept_vectors import Readout, article_tokens, readout, vector_change
from unlearning.evaluation.metrics.text_similarity import bleu, rouge_l
from unlearning.evaluation.metrics.value_vectors import Place, check_place, down_projections, noised, value_vector
from unlearning.evaluation.statistics import Direction, Metric, Resampled, Sample, combine
from unlearning.evaluation.subject import Subject

COMPLETION_TEMPLATE = "Please complete the following paragraph: {text}"

_OLD_COLUMNS = {"jaccard": "jaccard_unembed"}
"""Columns of runs written by earlier versions, with their present names."""

QA, COMPLETION, UNRELATED, VECTORS = "qa", "completion", "unrelated", "vectors"
TARGET = (QA, COMPLETION)


@dataclass(frozen=True)
class Concept:
    """One record of the benchmark.

    Attributes:
        name: of the concept.
        prompts: by the set that they belong to, as the models read them.
        place: of its value vector; None where the record names none.
        article: about it; empty where there is none.
    """

    name: str
    prompts: dict[str, tuple[str, ...]]
    place: Place | None
    article: str


@dataclass(frozen=True, eq=False)
class Vanilla:
    """The model before unlearning, and what it has said already."""

    subject: Subject
    said: dict[tuple[str, int], str] = field(default_factory=dict)

    def texts(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Its greedy continuations; of a prompt that it has seen, the same again."""
        fresh = list(dict.fromkeys(prompt for prompt in prompts if (prompt, max_new_tokens) not in self.said))
        for prompt, text in zip(fresh, continuations(self.subject, fresh, max_new_tokens), strict=True):
            self.said[prompt, max_new_tokens] = text
        return [self.said[prompt, max_new_tokens] for prompt in prompts]


@dataclass(frozen=True)
class _Question:
    """One prompt of one set, and the concept that it belongs to."""

    set: str
    concept: int
    prompt: str
    id: str


def concepts_of(records: Sequence[Record], source: str, *, per_concept: int | None = None) -> list[Concept]:
    """Concepts from ConceptVectors' records, with the benchmark's own prompts.

    Args:
        records: with `Concept`, `QA`, and what else there is of `text_completion`, `unrelated_QA`, `Layer`, `Dim` and
            `wikipedia_content`.
        source: for messages.
        per_concept: the first so many questions of each set only.

    Raises:
        InputError: a record is no concept, has other things than texts among its questions, or one of `Layer` and
            `Dim` only.
    """
    if per_concept is not None and per_concept < 1:
        raise InputError(f"--per-concept {per_concept}: 1 or more")
    found = []
    for number, record in enumerate(records, start=1):
        where = f"{source}, record {number}"
        if not is_concept(record):
            keys = ", ".join(map(str, record)) or "none"
            raise InputError(f'{where}: needs "Concept" and "QA", as ConceptVectors\' records; its keys are {keys}')
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
    vanilla: Vanilla | None,
    vectors: bool = True,
    noise: Sequence[float] = (),
    max_new_tokens: int = 100,
    seed: int = 0,
) -> Benchmark:
    """ConceptVectors, ready to run.

    Args:
        subject: the unlearned model.
        concepts: see `concepts_of`.
        vanilla: the model before unlearning, which every score compares with.
        vectors: look at the value vectors that the concepts name.
        noise: standard deviations of the noise on the vanilla model's vectors; the paper's is 0.1.
        max_new_tokens: most tokens of a text.
        seed: of noise and bootstrap.

    Raises:
        InputError: no vanilla model, no concept, a vector outside of the model, models of two shapes, or noise
            without vectors.
    """
    if vanilla is None:
        raise InputError("give --base, the model before unlearning: every score compares with it")
    if not concepts:
        raise InputError("there is no concept; name a file with at least one")
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: 1 or more")
    if any(not 0 <= scale < float("inf") for scale in noise):
        raise InputError(f"--noise {','.join(map(str, noise))}: standard deviations, 0 or more")
    placed = [concept for concept in concepts if vectors and concept.place is not None]
    _check_vectors(subject, vanilla.subject, placed)
    if noise and not placed:
        raise InputError("--noise changes the concepts' vectors, and no record names one (Layer and Dim); leave it out")
    questions = _questions(concepts)
    encoded = {name: _encoded(subject, asked) for name, asked in questions.items()}

    def score_texts(name: str, places: Sequence[int]) -> list[Row]:
        asked = [questions[name][place] for place in places]
        prompts = [question.prompt for question in asked]
        texts = continuations(subject, prompts, max_new_tokens)
        return _text_rows(concepts, asked, texts, vanilla.texts(prompts, max_new_tokens))

    def score_vectors(places: Sequence[int]) -> list[Row]:
        readouts = readout(vanilla.subject.model), readout(subject.model)
        return [_vector_row(placed[place], vanilla.subject, subject, readouts) for place in places]

    def score_noise(scale: float, places: Sequence[int]) -> list[Row]:
        return _noise_rows(vanilla, concepts, [flat[place] for place in places], scale, max_new_tokens, seed)

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
            "base_sha256": vanilla.subject.sha256,
            "concepts_sha256": hash_json([asdict(concept) for concept in concepts]),
            "vectors": len(placed),
            "noise": list(noise),
            "max_new_tokens": max_new_tokens,
            "seed": seed,
        },
        parts=parts,
        summarise=lambda rows, _retain: _metrics(rows, noise, vectors=vectors, seed=seed),
        provenance={"base": vanilla.subject.name},
        notes=(f"{without} of {len(concepts)} concepts have no Layer and Dim",) if vectors and without else (),
    )


def continuations(subject: Subject, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """What a model says to each prompt, greedily."""
    return greedy_answers(
        subject.model, subject.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=max(1, len(prompts))
    )


def _check_vectors(subject: Subject, vanilla: Subject, placed: Sequence[Concept]) -> None:
    for concept in placed:
        assert concept.place is not None
        for model in (vanilla, subject):
            check_place(model.model, concept.place, concept=concept.name, name=model.name)


def _questions(concepts: Sequence[Concept]) -> dict[str, list[_Question]]:
    """All prompts by set; of a set without any there is nothing."""
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
    concepts: Sequence[Concept], asked: Sequence[_Question], texts: Sequence[str], vanilla: Sequence[str]
) -> list[Row]:
    return [
        {
            "id": question.id,
            "group": concepts[question.concept].name,
            "kind": question.set,
            "prompt": question.prompt,
            "text": text,
            "vanilla_text": before,
            "bleu": bleu(text, before),
            "rouge_l": rouge_l(text, before),
        }
        for question, text, before in zip(asked, texts, vanilla, strict=True)
    ]


def _vector_row(concept: Concept, vanilla: Subject, subject: Subject, readouts: tuple[Readout, Readout]) -> Row:
    place = concept.place
    assert place is not None
    before, after = (value_vector(down_projections(each.model)[place.layer], place.dim) for each in (vanilla, subject))
    article = article_tokens(vanilla.tokenizer, concept.article)
    change = asdict(vector_change(before, after, readouts, article=article))
    promoted = {
        "promotes_unembed": change.pop("promoted"),
        "promotes_unembed_after": change.pop("promoted_after"),
        "promotes_norm_unembed": change.pop("promoted_norm"),
        "promotes_norm_unembed_after": change.pop("promoted_norm_after"),
    }
    texts = {
        name: " | ".join(str(vanilla.tokenizer.decode([token])) for token in tokens[:10])
        for name, tokens in promoted.items()
    }
    return {"id": concept.name, "group": concept.name, **asdict(place), **change, **texts}


def _noise_rows(
    vanilla: Vanilla,
    concepts: Sequence[Concept],
    asked: Sequence[_Question],
    scale: float,
    max_new_tokens: int,
    seed: int,
) -> list[Row]:
    rows: dict[_Question, Row] = {}
    model = vanilla.subject.model
    for number in dict.fromkeys(question.concept for question in asked):
        place = concepts[number].place
        assert place is not None
        mine = [question for question in asked if question.concept == number]
        prompts = [question.prompt for question in mine]
        clean = vanilla.texts(prompts, max_new_tokens)
        vector = value_vector(down_projections(model)[place.layer], place.dim)
        with noised(vector, scale=scale, seed=[seed, place.layer, place.dim]):
            texts = continuations(vanilla.subject, prompts, max_new_tokens)
        rows |= zip(mine, _text_rows(concepts, mine, texts, clean), strict=True)
    return [rows[question] for question in asked]


def _metrics(rows: Rows, noise: Sequence[float], *, vectors: bool, seed: int) -> list[Metric]:
    texts = rows[rows["set"].isin((QA, COMPLETION, UNRELATED))]
    metrics = _vector_metrics(rows[rows["set"] == VECTORS], vectors=vectors, seed=seed)
    metrics += _text_metrics(texts, "", "of the vanilla model's text", seed)
    for scale in noise:
        some = rows[rows["set"] == f"noise-{scale:g}"]
        metrics += _text_metrics(some, f"noise_{scale:g}_", f"of its clean text, with noise N(0, {scale:g}^2)", seed)
    return metrics


def _vector_metrics(rows: Rows, *, vectors: bool, seed: int) -> list[Metric]:
    described: dict[str, tuple[Direction, str]] = {
        "cosine": ("lower is better", "mean cosine of the concepts' value vectors with the vanilla model's, at most 1"),
        "l2": ("higher is better", "mean distance of the concepts' value vectors from the vanilla model's"),
        "jaccard_unembed": (
            "lower is better",
            "mean Jaccard overlap of the 200 tokens that the vectors promote most, read with the unembedding alone "
            "(as published), 0 to 1",
        ),
        "jaccard_norm_unembed": (
            "lower is better",
            "mean Jaccard overlap of the 200 tokens that the vectors promote most, read with the final norm and the "
            "unembedding, 0 to 1",
        ),
        "preciser": (
            "lower is better",
            "promoted tokens that are in the concept's article, now by before; may exceed 1",
        ),
        "related": (
            "lower is better",
            "share of the promoted tokens that are in the concept's article which still are promoted",
        ),
    }
    names = {"preciser": "preciser_jaccard", "related": "related_token_rate"}
    reason = "left out by --no-vectors" if not vectors else "no record names its vector (Layer and Dim)"
    rows = rows.rename(columns=_OLD_COLUMNS)
    sample = None if rows.empty else Sample("concepts", rows["group"].tolist(), seed=seed)
    metrics = []
    for column, (direction, meaning) in described.items():
        if sample is not None and column not in rows:
            earlier = "the run was written by an earlier version; evaluate again into another directory"
            metrics.append(Metric(f"vector_{column}", None, direction, meaning, earlier))
            continue
        estimate = None if sample is None else sample.mean(rows[column].to_numpy(np.float64))
        missing = None
        if estimate is None:
            missing = reason if rows.empty else "no promoted token is in a concept's article (wikipedia_content)"
            if column == "cosine" and not rows.empty:
                missing = "the vectors are zero"
        metrics.append(Metric(f"vector_{names.get(column, column)}", estimate, direction, meaning, missing))
    return metrics


def _text_metrics(rows: Rows, prefix: str, of: str, seed: int) -> list[Metric]:
    """Means by set, and unrelated minus target; concepts are drawn whole, with all that was asked for them."""
    sample = Sample(f"{prefix}texts", rows["group"].tolist(), seed=seed)
    metrics = []
    for column, name in (("bleu", "BLEU"), ("rouge_l", "ROUGE-L F1")):
        values = rows[column].to_numpy(np.float64)

        def mean(*kinds: str, values: Any = values) -> Resampled | None:
            return sample.mean(np.where(rows["kind"].isin(kinds), values, np.nan))

        target, unrelated = mean(*TARGET), mean(UNRELATED)
        sets: list[tuple[str, Resampled | None, Direction, str]] = [
            ("qa", mean(QA), "lower is better", "questions about the concepts"),
            ("completion", mean(COMPLETION), "lower is better", "texts about the concepts"),
            ("target", target, "lower is better", "questions and texts about the concepts"),
            ("unrelated", unrelated, "higher is better", "unrelated questions"),
        ]
        if prefix:
            sets = sets[2:]
        for kind, estimate, direction, what in sets:
            missing = None if estimate else f"no concept has {what}"
            metrics.append(
                Metric(f"{prefix}{kind}_{column}", estimate, direction, f"mean {name} {of}, {what}", missing)
            )
        gap = combine(np.subtract, unrelated, target) if target and unrelated else None
        metrics.append(
            Metric(
                f"{prefix}difference_{column}",
                gap,
                "higher is better",
                f"{name} {of}: unrelated questions minus those about the concepts; 0 where both changed alike",
                None if gap else "needs questions about the concepts and unrelated ones",
            )
        )
    return metrics
