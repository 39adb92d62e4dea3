"""TOFU (2401.06121): questions about authors to be forgotten, about other authors, and about the world.

Every row is scored in log space: mean negative log-likelihoods (nats per token) of the answer, its paraphrase and
wrong answers, which tokens are the likeliest, and the greedy answer. `summary` computes metrics from the rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

import numpy as np

from unlearning.common.errors import check_at_least
from unlearning.common.hashing import hash_json
from unlearning.data.question_answer import Wrapping
from unlearning.evaluation.benchmarks.tofu.sets import Question, QuestionSet
from unlearning.evaluation.benchmarks.tofu.summary import FORMS, shown_floor, summarise
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Benchmark, Part, Row
from unlearning.evaluation.metrics.memorisation import exact_memorisation, extraction_strength
from unlearning.evaluation.metrics.probability import normalised_probability
from unlearning.evaluation.metrics.text_match import rouge_l_recall
from unlearning.evaluation.metrics.text_quality import fault
from unlearning.evaluation.metrics.truth_ratio import log_truth_ratio, log_truth_ratio_arithmetic
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, TokenScores, encode_target, score_tokens

MAX_NEW_TOKENS = 200
"""Maximum number of tokens of a generated answer, as in the public code."""

FEW_AUTHORS = 10
"""A note warns of intervals over fewer authors."""

Asked = dict[str, list[Target]]
"""Scored texts of one row: its answer, its paraphrased answer, its perturbed answers, and its answer to the paraphrased
question."""


def prepare(
    subject: Subject,
    *,
    sets: Sequence[QuestionSet],
    wrapping: Wrapping | None = None,
    append_eos: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
    generate: bool = True,
    seed: int = 0,
) -> Benchmark:
    """Make TOFU ready for a model.

    Args:
        subject: The model.
        sets: The question sets; see `sets.read_sets`.
        wrapping: Text around each question.
        append_eos: Score answers with the end-of-sequence token, as the public codes do.
        max_new_tokens: Maximum number of tokens of a generated answer.
        generate: Generate answers; otherwise ROUGE and model utility, which need them, are left out.
        seed: Random seed of the bootstrap.

    Returns:
        The benchmark, with one set per question set.

    Raises:
        InputError: A question and its answer do not fit into the model's context, the model has no embedding for a
            token, or `max_new_tokens` is below 1.
    """
    check_at_least("max_new_tokens", max_new_tokens, 1)
    wrapping = wrapping or Wrapping()
    encode = partial(encode_target, subject, chat=wrapping.chat, append_eos=append_eos)
    asked = {each.name: [_targets(question, wrapping, encode) for question in each.questions] for each in sets}
    tokens = {name: [[target.span.input_ids for target in _flat(row)] for row in rows] for name, rows in asked.items()}
    subject.check_tokens([ids for rows in tokens.values() for row in rows for ids in row])
    answer = partial(_generated, subject, wrapping, max_new_tokens) if generate else None
    return Benchmark(
        name="tofu",
        configuration={
            "split": sets[0].label,
            "wrapping": wrapping.question("{question}"),
            "max_new_tokens": max_new_tokens if generate else None,
            **{f"{each.name}_sha256": hash_json([_content(question) for question in each.questions]) for each in sets},
            "tokenisation_sha256": hash_json(tokens),  # losses per token of other tokens cannot be compared
        },
        parts=[
            Part(
                each.name,
                costs=[sum(map(len, row)) for row in tokens[each.name]],
                score=partial(_score, subject, each, asked[each.name], answer),
            )
            for each in sets
        ],
        summarise=partial(summarise, seed=seed),
        provenance={"data": {each.name: each.source for each in sets}},
        notes=_notes(sets),
    )


def _targets(question: Question, wrapping: Wrapping, encode: Callable[[str, str], Target]) -> Asked:
    def encoded(asked: str, *answers: str) -> list[Target]:
        prompt = wrapping.question(asked)
        return [encode(prompt, answer) for answer in answers]

    paraphrased = [] if question.paraphrased_answer is None else [question.paraphrased_answer]
    reworded = question.paraphrased_question
    return {
        "answer": encoded(question.question, question.answer),
        "paraphrased_answer": encoded(question.question, *paraphrased),
        "perturbed_answer": encoded(question.question, *question.perturbed_answers),
        "paraphrased_question": [] if reworded is None else encoded(reworded, question.answer),
    }


def _score(
    subject: Subject,
    asked_set: QuestionSet,
    asked: Sequence[Asked],
    answer: Callable[[list[str]], list[str]] | None,
    places: Sequence[int],
) -> list[Row]:
    """Return what is measured of the rows at these indices."""
    questions = [asked_set.questions[place] for place in places]
    flat = [target for place in places for target in _flat(asked[place])]
    scores = iter(score_tokens(subject, flat, batch_size=len(places)))
    rows = []
    for place, question in zip(places, questions, strict=True):
        scored = {key: list(islice(scores, len(targets))) for key, targets in asked[place].items()}
        # TOFU's files of real authors and world facts have no paraphrases; the right answer there is the answer.
        correct = "paraphrased_answer" if asked_set.name in ("forget", "retain") else "answer"
        rows.append({"id": question.id, "group": question.group, **_likelihoods(scored, correct)})
    if answer is not None:
        _add_generated(rows, [q.question for q in questions], questions, answer, suffix="")
        if questions[0].paraphrased_question is not None:
            reworded = [q.paraphrased_question or "" for q in questions]
            _add_generated(rows, reworded, questions, answer, suffix="_paraphrased_question")
    return rows


def _likelihoods(scored: dict[str, list[TokenScores]], correct: str) -> Row:
    (answer,) = scored["answer"]
    likeliest = answer.without_closing().is_likeliest
    row: Row = {
        "n_answer_tokens": len(answer.log_probs),
        "answer_nll": answer.mean_nll,
        "exact_memorisation": exact_memorisation(likeliest),
        "extraction_strength": extraction_strength(likeliest),
    }
    for key in ("paraphrased_answer", "paraphrased_question"):
        for other in scored[key]:
            row[f"{key}_nll"] = other.mean_nll
    wrong = np.array([other.mean_nll for other in scored["perturbed_answer"]])
    if len(wrong):
        row["perturbed_answer_nlls"] = wrong.tolist()
        row["normalised_probability"] = normalised_probability(answer.mean_nll, wrong)
    if len(wrong) and scored[correct]:
        right = scored[correct][0].mean_nll
        row["log_truth_ratio"] = log_truth_ratio(right, wrong)
        row["log_truth_ratio_arithmetic"] = log_truth_ratio_arithmetic(right, wrong)
    return row


def _generated(subject: Subject, wrapping: Wrapping, max_new_tokens: int, asked: list[str]) -> list[str]:
    """Return the greedy answer to each question."""
    return greedy_answers(
        subject.model,
        subject.tokenizer,
        [wrapping.question(question) for question in asked],
        max_new_tokens=max_new_tokens,
        batch_size=len(asked),
        chat=wrapping.chat,
    )


def _add_generated(
    rows: list[Row],
    asked: list[str],
    questions: Sequence[Question],
    answer: Callable[[list[str]], list[str]],
    *,
    suffix: str,
) -> None:
    for row, question, generated in zip(rows, questions, answer(asked), strict=True):
        row[f"generated{suffix}"] = generated
        row[f"rouge{suffix}"] = rouge_l_recall(generated, question.answer)
        row[f"is_faulty{suffix}"] = fault(generated) is not None


def _flat(asked: Asked) -> list[Target]:
    return [target for targets in asked.values() for target in targets]


def _content(question: Question) -> list[str | list[str] | None]:
    """Return everything of a row that its numbers and their grouping depend on."""
    texts = (question.question, question.answer, question.paraphrased_question, question.paraphrased_answer)
    return [*texts, list(question.perturbed_answers), question.group]


def _notes(sets: Sequence[QuestionSet]) -> tuple[str, ...]:
    n = len(sets[0].questions)
    notes = [f"{each.name}: {len(each.questions)} rows of {each.source}" for each in sets]
    notes.append(f"forget quality of {n} rows cannot be below {shown_floor(n, n)} (at D = 1)")
    if any(question.perturbed_answers for each in sets for question in each.questions):
        notes.append(FORMS)
    for each in sets:
        authors = len({question.group for question in each.questions} - {""})
        if 1 < authors < FEW_AUTHORS:
            notes.append(
                f"{each.name}: the bootstrap draws {authors} whole authors; intervals over so few are unreliable"
            )
    return tuple(notes)
