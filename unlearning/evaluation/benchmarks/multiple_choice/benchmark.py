"""Multiple-choice questions: asked by letter, by the text of the options, and without showing them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np
from jaxtyping import Float

from unlearning.common.errors import InputError
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
"""An option of fewer characters than the longest may have a few more tokens."""


def prepare(
    subject: Subject,
    *,
    sets: Mapping[str, Sequence[Question]],
    name: str = "choice",
    role: Role = "none",
    scoring: Sequence[str] = SCORINGS,
    permute: int = 0,
    few_shot: Sequence[Question] = (),
    n_shots: int = 5,
    chat: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Benchmark:
    """Make sets of multiple-choice questions ready for a model.

    Args:
        subject: the model.
        sets: questions by the name of their set.
        name: of the benchmark.
        role: what a good unlearned model does with them: it fails (`forget`), answers (`retain`), or neither.
        scoring: of `SCORINGS`: `letter` (the options are listed, their letters are scored), `answer` (listed, their
            texts are scored), `cloze` (not listed, their texts are scored).
        permute: ask each question again, by letter, in so many other orders of its options.
        few_shot: solved questions to show before those of the same subject.
        n_shots: how many of them, the first ones.
        chat: wrap the whole prompt by the tokenizer's chat template.
        limit: use the first so many questions of each set.
        seed: of orders and bootstrap draws.

    Raises:
        InputError: what `check_scoring` raises, no question that fits into the model's context, or a tokenizer
            without a chat template.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: 1 or more")
    kinds = check_scoring(scoring, permute)
    about = {question.subject for questions in sets.values() for question in questions}
    shots = {topic: tuple(shot for shot in few_shot if shot.subject == topic)[:n_shots] for topic in sorted(about)}
    asking = _Asking(subject, kinds, shots, chat_format(subject.tokenizer) if chat else None, permute, seed)
    parts: list[Part] = []
    hashes: dict[str, str] = {}
    notes = ["where several options score best, the first of them counts as chosen"]
    for set_name, questions in sets.items():
        wanted = list(questions)[:limit]
        asked, costs = _that_fit(asking, wanted)
        if not asked:
            raise InputError(f"{set_name}: no question fits into the context of {subject.name}; use another model")
        if len(asked) < len(wanted):
            note = f"{len(wanted) - len(asked)} of {len(wanted)} questions do not fit into the model's context"
            notes.append(f"{set_name}: {note} and are left out")
        if blank := sum(map(_is_blank, asked)):
            notes.append(f"{set_name}: {blank} questions with an empty option are scored by letter only")
        hashes[set_name] = hash_json([asdict(question) for question in asked])
        parts.append(_part(set_name, asked, costs, asking))
    return Benchmark(
        name=name,
        configuration={"data_sha256": hashes, **asking.configuration},
        parts=parts,
        summarise=lambda rows, _retain_rows: summarise(rows, scoring=kinds, permute=permute, role=role, seed=seed),
        notes=tuple(notes),
    )


def check_scoring(scoring: Sequence[str], permute: int) -> tuple[str, ...]:
    """The kinds of scoring, in their order.

    Raises:
        InputError: one is not known, there is none, or orders are to be compared without letters.
    """
    unknown = [kind for kind in scoring if kind not in SCORINGS]
    if unknown or not scoring:
        raise InputError(f"--scoring {','.join(unknown)}: use one or several of {','.join(SCORINGS)}")
    if permute < 0:
        raise InputError(f"--permute {permute}: 0 or more")
    if permute and "letter" not in scoring:
        raise InputError("--permute asks for letters; add letter to --scoring")
    return tuple(kind for kind in SCORINGS if kind in scoring)


def check_role(role: str) -> Role:
    """The role, if it is one.

    Raises:
        InputError: it is not.
    """
    for known in get_args(Role):
        if role == known:
            return known
    raise InputError(f"--role {role}: use {', '.join(get_args(Role))}")


@dataclass(frozen=True)
class _Request:
    """One way of asking a question: the options' continuations of one prompt.

    Attributes:
        kind: of scoring, or `permuted`.
        order: which option each continuation stands for.
        targets: the continuations.
    """

    kind: str
    order: list[int]
    targets: list[Target]


@dataclass(frozen=True)
class _Asking:
    """How questions are put to a model."""

    subject: Subject
    scoring: tuple[str, ...]
    shots: Mapping[str, tuple[Question, ...]]
    chat: ChatFormat | None
    permute: int
    seed: int

    @property
    def configuration(self) -> dict[str, object]:
        """What the rows depend on beside model and questions."""
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
        """What stands before the answer."""
        shots = self.shots[question.subject]
        if kind == "cloze":
            text = cloze_prompt(question, shots)
        else:
            text = listed_prompt(question, shots, by_letter=kind != "answer", order=order)
        return text if self.chat is None else self.chat.prompt(text)

    def requests(self, question: Question) -> list[_Request]:
        """All ways of asking a question."""
        own = list(range(len(question.choices)))
        asked = [(kind, own) for kind in self.scoring if kind == "letter" or not _is_blank(question)]
        asked += [("permuted", order) for order in other_orders(question, self.permute, seed=self.seed)]
        return [_Request(kind, order, self._targets(question, kind, order)) for kind, order in asked]

    def _targets(self, question: Question, kind: str, order: list[int]) -> list[Target]:
        prompt = self.prompt(question, kind, order)
        texts = question.choices if kind in ("answer", "cloze") else LETTERS[: len(order)]
        return [encode_target(self.subject, prompt, text, chat=self.chat, append_eos=False) for text in texts]


def _that_fit(asking: _Asking, questions: Sequence[Question]) -> tuple[list[Question], list[int]]:
    """The questions that the model's context holds with any of their options, and their numbers of tokens."""
    if not questions:
        return [], []

    def lengths(texts: list[str]) -> np.ndarray:
        return np.array([len(ids) for ids in asking.subject.tokenizer(texts, verbose=False)["input_ids"]])

    options = lengths([" " + max(question.choices, key=len) for question in questions])
    longest = np.max(
        [
            lengths([asking.prompt(question, kind) for question in questions]) + (1 if kind == "letter" else options)
            for kind in asking.scoring
        ],
        axis=0,
    )
    limit = asking.subject.context
    kept = [place for place, length in enumerate(longest) if limit is None or length + _SPARE_TOKENS <= limit]
    return [questions[place] for place in kept], [int(longest[place]) for place in kept]


def _part(name: str, questions: Sequence[Question], costs: Sequence[int], asking: _Asking) -> Part:
    def score(places: Sequence[int]) -> list[Row]:
        asked = [(questions[place], asking.requests(questions[place])) for place in places]
        targets = [target for _, requests in asked for request in requests for target in request.targets]
        scores = iter(score_tokens(asking.subject, targets, batch_size=len(places)))
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
