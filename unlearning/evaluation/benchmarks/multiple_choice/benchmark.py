"""Multiple-choice questions: scored by letter, by the text of the options, and without showing the options."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float

from unlearning.common.errors import InputError, check_at_least
from unlearning.common.hashing import hash_json
from unlearning.data.chat import ChatFormat, chat_format
from unlearning.data.choice_questions import LETTERS, Question
from unlearning.evaluation.benchmarks.multiple_choice.summary import Role, summarise
from unlearning.evaluation.harness import Benchmark, Part, Row
from unlearning.evaluation.metrics.multiple_choice import (
    choose,
    cloze_prompt,
    listed_prompt,
    normalised,
    other_orders,
    share_of,
)
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target, encode_target, score_tokens

SCORINGS = ("letter", "answer", "cloze")

_SPARE_TOKENS = 4
"""Tokens kept free, since an option with fewer characters than the longest may have a few more tokens."""


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        scoring: Scorings of `SCORINGS`: `letter` (the options are listed, their letters are scored), `answer` (listed,
            their texts are scored), `cloze` (not listed, their texts are scored).
        permute: Ask each question again, by letter, in N other orders of its options.
        few_shot: Solved questions, shown before the questions of the same subject.
        n_shots: Number of solved questions shown, the first ones.
        chat: Wrap the whole prompt by the tokenizer's chat template.
        limit: Use only the first N questions of each set.
    """

    scoring: Sequence[str] = SCORINGS
    permute: int = 0
    few_shot: Sequence[Question] = ()
    n_shots: int = 5
    chat: bool = False
    limit: int | None = None


def prepare(
    subject: Subject,
    *,
    sets: Mapping[str, Sequence[Question]],
    asking: Asking | None = None,
    name: str = "choice",
    role: Role = "none",
    seed: int = 0,
) -> Benchmark:
    """Make sets of multiple-choice questions ready for a model.

    Args:
        subject: The model.
        sets: Questions by the name of their set.
        asking: How the questions are asked; None for the defaults.
        name: Name of the benchmark.
        role: What a good unlearned model does: fails on the questions (`forget`), answers them (`retain`), or neither.
        seed: Random seed of the orders and of the bootstrap.

    Returns:
        The benchmark, with one set per entry of `sets`.

    Raises:
        InputError: A setting is out of range, no question fits into the model's context, or the tokenizer has no
            chat template.
    """
    asking = asking or Asking()
    if asking.limit is not None:
        check_at_least("limit", asking.limit, 1)
    kinds = check_scoring(asking.scoring, asking.permute)
    topics = sorted({question.subject for questions in sets.values() for question in questions})
    shots = {
        topic: tuple(shot for shot in asking.few_shot if shot.subject == topic)[: asking.n_shots] for topic in topics
    }
    chat = chat_format(subject.tokenizer, instead="leave `chat` out") if asking.chat else None
    asker = _Asker(subject, kinds, shots, chat, asking.permute, seed)
    parts: list[Part] = []
    hashes: dict[str, str] = {}
    notes = ["if several options score best, the first of them counts as chosen"]
    for set_name, questions in sets.items():
        wanted = list(questions)[: asking.limit]
        asked, costs = _that_fit(asker, wanted)
        if not asked:
            raise InputError(f"{set_name}: no question fits into the context of {subject.name}. Use another model.")
        if len(asked) < len(wanted):
            note = f"{len(wanted) - len(asked)} of {len(wanted)} questions do not fit into the model's context"
            notes.append(f"{set_name}: {note} and are left out")
        if blank := sum(map(_is_blank, asked)):
            notes.append(f"{set_name}: {blank} questions with an empty option are scored by letter only")
        hashes[set_name] = hash_json([asdict(question) for question in asked])
        parts.append(_part(set_name, asked, costs, asker))
    return Benchmark(
        name=name,
        configuration={"data_sha256": hashes, **asker.configuration},
        parts=parts,
        summarise=lambda rows, _control: summarise(rows, scoring=kinds, permute=asker.permute, role=role, seed=seed),
        notes=tuple(notes),
    )


def check_scoring(scoring: Sequence[str], permute: int) -> tuple[str, ...]:
    """Return the kinds of scoring, in the order of `SCORINGS`.

    Args:
        scoring: Names of `SCORINGS`.
        permute: Number of other orders of the options.

    Returns:
        Names of `SCORINGS`, at least one.

    Raises:
        InputError: A scoring is unknown, none is named, or orders are compared without letters.
    """
    unknown = [kind for kind in scoring if kind not in SCORINGS]
    if unknown or not scoring:
        raise InputError(f"`scoring` must be among {','.join(SCORINGS)}, got {','.join(unknown) or 'none'}")
    check_at_least("permute", permute, 0)
    if permute and "letter" not in scoring:
        raise InputError("`permute` compares letters. Add letter to `scoring`.")
    return tuple(kind for kind in SCORINGS if kind in scoring)


def check_role(role: str) -> Role:
    """Check a role.

    Returns:
        The role.

    Raises:
        InputError: There is no such role.
    """
    for known in get_args(Role):
        if role == known:
            return known
    raise InputError(f"`role` must be one of {', '.join(get_args(Role))}, got {role!r}")


@dataclass(frozen=True)
class _Request:
    """One way to ask a question: the options as continuations of one prompt.

    Attributes:
        kind: Kind of scoring, or `permuted`.
        order: Index of the option that each continuation stands for.
        targets: The continuations.
    """

    kind: str
    order: list[int]
    targets: list[Target]


@dataclass(frozen=True)
class _Asker:
    """Turns questions into prompts and continuations of one model."""

    subject: Subject
    scoring: tuple[str, ...]
    shots: Mapping[str, tuple[Question, ...]]
    chat: ChatFormat | None
    permute: int
    seed: int

    @property
    def configuration(self) -> dict[str, object]:
        """Everything that the rows depend on besides model and questions."""
        chat = None
        if self.chat is not None:
            template = self.chat.tokenizer.get_chat_template()
            chat = {"date": self.chat.date, "template_sha256": hash_json(template)}
        shots = {topic: [asdict(shot) for shot in shots] for topic, shots in self.shots.items()}
        return {
            "scoring": list(self.scoring),
            "few_shot_sha256": hash_json(shots) if any(shots.values()) else None,
            "chat": chat,
            "permute": self.permute,
            "permute_seed": self.seed if self.permute else None,
        }

    def prompt(self, question: Question, kind: str, order: Sequence[int] | None = None) -> str:
        """Return the text before the answer."""
        shots = self.shots[question.subject]
        if kind == "cloze":
            text = cloze_prompt(question, shots)
        else:
            text = listed_prompt(question, shots, by_letter=kind != "answer", order=order)
        return text if self.chat is None else self.chat.prompt(text)

    def requests(self, question: Question) -> list[_Request]:
        """Return all ways to ask a question."""
        own = list(range(len(question.choices)))
        asked = [(kind, own) for kind in self.scoring if kind == "letter" or not _is_blank(question)]
        asked += [("permuted", order) for order in other_orders(question, self.permute, seed=self.seed)]
        return [_Request(kind, order, self._targets(question, kind, order)) for kind, order in asked]

    def _targets(self, question: Question, kind: str, order: list[int]) -> list[Target]:
        prompt = self.prompt(question, kind, order)
        texts = question.choices if kind in ("answer", "cloze") else LETTERS[: len(order)]
        return [encode_target(self.subject, prompt, text, chat=self.chat, append_eos=False) for text in texts]


def _that_fit(asker: _Asker, questions: Sequence[Question]) -> tuple[list[Question], list[int]]:
    """Return the questions that fit into the model's context with any of their options, and their numbers of tokens."""
    if not questions:
        return [], []

    def lengths(texts: list[str]) -> np.ndarray:
        return np.array([len(ids) for ids in asker.subject.tokenizer(texts, verbose=False)["input_ids"]])

    options = lengths([" " + max(question.choices, key=len) for question in questions])
    longest = np.max(
        [
            lengths([asker.prompt(question, kind) for question in questions]) + (1 if kind == "letter" else options)
            for kind in asker.scoring
        ],
        axis=0,
    )
    limit = asker.subject.context
    kept = [place for place, length in enumerate(longest) if limit is None or length + _SPARE_TOKENS <= limit]
    return [questions[place] for place in kept], [int(longest[place]) for place in kept]


def _part(name: str, questions: Sequence[Question], costs: Sequence[int], asker: _Asker) -> Part:
    def score(places: Sequence[int]) -> list[Row]:
        asked = [(questions[place], asker.requests(questions[place])) for place in places]
        targets = [target for _, requests in asked for request in requests for target in request.targets]
        scores = iter(score_tokens(asker.subject, targets, batch_size=len(places)))
        return [
            _row(question, [(request, [next(scores).log_probs for _ in request.targets]) for request in requests])
            for question, requests in asked
        ]

    return Part(name, costs, score)


def _row(question: Question, found: Sequence[tuple[_Request, list[Float[np.ndarray, " token"]]]]) -> Row:
    row: Row = {"id": question.id, "group": question.group, "subject": question.subject, "question": question.text}
    row |= {"n_choices": len(question.choices), "answer": question.answer}
    permuted: list[int] = []
    for request, options in found:
        log_likelihoods = [float(log_probs.sum()) for log_probs in options]
        best = choose(log_likelihoods)
        if request.kind == "letter":
            row |= {
                "letter_log_likelihoods": log_likelihoods,
                "letter_choice": best.place,
                "letter_n_best": best.n_best,
                "letter_correct": best.place == question.answer,
                "letter_probability": share_of(log_likelihoods, question.answer),
            }
        elif request.kind == "permuted":
            permuted.append(request.order[best.place])
        else:
            n_tokens = [len(log_probs) for log_probs in options]
            row |= {f"{request.kind}_log_likelihoods": log_likelihoods, f"{request.kind}_n_tokens": n_tokens}
            for way, scores in normalised(log_likelihoods, n_tokens=n_tokens, choices=question.choices).items():
                row[f"{request.kind}_{way}_correct"] = choose(scores).place == question.answer
    if permuted:
        row |= {
            "permuted_choices": permuted,
            "permuted_correct": float(np.mean([place == question.answer for place in permuted])),
            "permuted_consistent": set(permuted) == {row["letter_choice"]},
        }
    return row


def _is_blank(question: Question) -> bool:
    return any(not choice.strip() for choice in question.choices)
