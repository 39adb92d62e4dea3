"""Who's Harry Potter's two familiarity scores (2310.02238), on the user's own prompts.

A record has a `prompt`, and

* `specific` and `generic`: candidates for the next words (probability form), or
* `references` and `subtle`: names and ideas, and themes, of the text (completion form, judged by rule), or
* all of them; or neither, if a judge is given.

    metric                   formula                                                range    unlearned   source
    familiarity_probability  sum of p(first token of a specific candidate)          0 to 1   lower       2310.02238
    familiarity_share        that sum / the sum over specific and generic           0 to 1   lower       here
    familiarity_whole        sum of p(specific candidate, all of its tokens)        0 to 1   lower       here
    familiarity_completion   (5 share of class 1 + share of class 2) / 5            0 to 1   lower       2310.02238
    completion_class_1..4    share of completions in each class                     0 to 1   lower (1, 2)

Each is a mean over prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unlearning.common.errors import InputError, check_at_least
from unlearning.common.hashing import hash_json
from unlearning.data.records import Record, read_records
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.harness import Benchmark, Part, Row, Rows
from unlearning.evaluation.judges import Judge, judge_by_rule
from unlearning.evaluation.metrics.familiarity import CLASS_SCORES, CLASSES, Candidates, encode_candidates, familiarity
from unlearning.evaluation.statistics import Metric, Sample
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import score_tokens

PROBABILITY, COMPLETION = "probability", "completion"


@dataclass(frozen=True)
class FamiliarityPrompt:
    """One record.

    Attributes:
        prompt: Text that the model continues.
        specific: Candidates for the next words that only the text accounts for; empty for the completion form.
        generic: Candidates that any text could continue with; may be empty.
        references: Names and ideas that only the text has.
        subtle: Themes typical of the text.
        id: Identifier of the record.
        group: Group of the record, which the bootstrap draws whole.
    """

    prompt: str
    specific: tuple[str, ...] = ()
    generic: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    subtle: tuple[str, ...] = ()
    id: str = ""
    group: str = ""


def read_prompts(path: str | Path) -> list[FamiliarityPrompt]:
    """Read the prompts of a file.

    Args:
        path: The file.

    Returns:
        One prompt per record, in the same order.

    Raises:
        InputError: The file cannot be read, or a record has no prompt, has candidates or names that are no list of
            texts, has `generic` without `specific`, or has `subtle` without `references`.
    """
    return [_prompt(record, f"{path}, record {number}") for number, record in enumerate(read_records(path), start=1)]


def prepare(
    subject: Subject,
    *,
    prompts: Sequence[FamiliarityPrompt],
    judge: Judge | None = None,
    max_new_tokens: int = 100,
    limit: int | None = None,
    seed: int = 0,
) -> Benchmark:
    """Make familiarity ready for a model.

    Args:
        subject: The model.
        prompts: The prompts; see `read_prompts`.
        judge: Judges completions instead of the rule; then every prompt is completed.
        max_new_tokens: Maximum number of tokens of a completion; the paper states none.
        limit: Use only the first N prompts of each form.
        seed: Random seed of the bootstrap.

    Returns:
        The benchmark, with the sets `probability` and `completion`, or one of them.

    Raises:
        InputError: No prompt has candidates or references, and no judge is given.
    """
    if limit is not None:
        check_at_least("limit", limit, 1)
    check_at_least("max_new_tokens", max_new_tokens, 1)
    with_candidates = [one for one in prompts if one.specific][:limit]
    completed = [one for one in prompts if judge is not None or one.references][:limit]
    if not with_candidates and not completed:
        raise InputError(
            '`prompts` must have candidates ("specific") or names of the text ("references"), got neither. '
            "Add them, or give `judge`."
        )
    candidates = [encode_candidates(subject, one.prompt, one.specific, one.generic) for one in with_candidates]
    subject.check_tokens([target.span.input_ids for some in candidates for target in (*some.specific, *some.generic)])

    def score_candidates(places: Sequence[int]) -> list[Row]:
        return _candidate_rows(
            subject, [with_candidates[place] for place in places], [candidates[place] for place in places]
        )

    def score_completions(places: Sequence[int]) -> list[Row]:
        return _completion_rows(subject, [completed[place] for place in places], judge, max_new_tokens)

    parts = []
    if with_candidates:
        costs = [len(some.specific[0].span.input_ids) for some in candidates]
        parts.append(Part(PROBABILITY, costs, score_candidates))
    if completed:
        lengths = [subject.tokenizer(one.prompt, verbose=False)["input_ids"] for one in completed]
        subject.check_tokens(lengths)
        parts.append(Part(COMPLETION, [len(ids) for ids in lengths], score_completions))
    return Benchmark(
        name="familiarity",
        configuration={
            "prompts_sha256": hash_json([asdict(one) for one in (*with_candidates, *completed)]),
            "judge": None if not completed else "rule" if judge is None else judge.identity,
            "max_new_tokens": max_new_tokens if completed else None,
            "seed": seed,
        },
        parts=parts,
        summarise=lambda rows, _control: _metrics(rows, seed),
        notes=_notes(candidates, by_rule=bool(completed) and judge is None),
    )


def _candidate_rows(
    subject: Subject, prompts: Sequence[FamiliarityPrompt], candidates: Sequence[Candidates]
) -> list[Row]:
    targets = [target for some in candidates for target in (*some.specific, *some.generic)]
    scores = iter(score_tokens(subject, targets, batch_size=max(8, len(prompts))))
    rows = []
    for one, some in zip(prompts, candidates, strict=True):
        found = familiarity(some, [next(scores) for _ in (*some.specific, *some.generic)])
        rows.append(
            {"id": one.id, "group": one.group, "prompt": one.prompt, "n_shared": some.n_shared, **asdict(found)}
        )
    return rows


def _completion_rows(
    subject: Subject, prompts: Sequence[FamiliarityPrompt], judge: Judge | None, max_new_tokens: int
) -> list[Row]:
    completions = greedy_answers(
        subject.model,
        subject.tokenizer,
        [one.prompt for one in prompts],
        max_new_tokens=max_new_tokens,
        batch_size=len(prompts),
    )
    rows: list[Row] = []
    for one, text in zip(prompts, completions, strict=True):
        if judge is None:
            found = judge_by_rule(one.prompt, text, one.references, one.subtle)
        else:
            found = judge(one.prompt, text)
        rows.append({"id": one.id, "group": one.group, "prompt": one.prompt, "text": text, "class": found})
    return rows


def _metrics(rows: Rows, seed: int) -> list[Metric]:
    return _probability_metrics(rows[rows["set"] == PROBABILITY], seed) + _completion_metrics(
        rows[rows["set"] == COMPLETION], seed
    )


def _probability_metrics(rows: Rows, seed: int) -> list[Metric]:
    meanings = {
        "specific": (
            "familiarity_probability",
            "total next-token probability of the candidates that only the text accounts for (their first tokens), "
            "mean over prompts, 0 to 1",
        ),
        "share": (
            "familiarity_share",
            "that probability as a share of the specific and generic candidates' together, 0 to 1",
        ),
        "whole": (
            "familiarity_whole",
            "total probability of the whole specific candidates, over all of their tokens, 0 to 1",
        ),
    }
    if rows.empty:
        reason = 'no prompt has "specific" candidates'
        return [Metric(name, None, "lower is better", text, reason) for name, text in meanings.values()]
    sample = Sample(PROBABILITY, rows["group"].tolist(), seed=seed)
    metrics = []
    for column, (name, text) in meanings.items():
        estimate = sample.mean(rows[column].to_numpy(np.float64))
        missing = (
            None if estimate else 'no prompt has "generic" candidates whose first tokens differ from specific ones'
        )
        metrics.append(Metric(name, estimate, "lower is better", text, missing))
    return metrics


def _completion_metrics(rows: Rows, seed: int) -> list[Metric]:
    score = (
        "(5 * share of class 1 + share of class 2) / 5, 0 to 1; the constant 5 is not verified against the paper's code"
    )
    if rows.empty:
        reason = 'no prompt has "references", and `judge` is not given'
        return [Metric("familiarity_completion", None, "lower is better", score, reason)]
    sample = Sample(COMPLETION, rows["group"].tolist(), seed=seed)
    classes = rows["class"].to_numpy(np.int64)
    values = np.array([CLASS_SCORES[one] for one in classes])
    metrics = [Metric("familiarity_completion", sample.mean(values), "lower is better", score)]
    for number, meaning in CLASSES.items():
        share = sample.mean((classes == number).astype(np.float64))
        direction: Any = "lower is better" if number < 3 else "descriptive, no direction"
        metrics.append(Metric(f"completion_class_{number}", share, direction, f"share of completions with {meaning}"))
    return metrics


def _notes(candidates: Sequence[Candidates], *, by_rule: bool) -> tuple[str, ...]:
    notes = []
    shared = sum(some.n_shared for some in candidates)
    if shared:
        notes.append(
            f"{shared} first tokens begin both specific and generic candidates and count for neither; "
            "familiarity_whole tells the candidates apart"
        )
    if by_rule:
        notes.append("completions are judged by a rule, which misses paraphrases and never assigns class 3")
    return tuple(notes)


def _prompt(record: Record, where: str) -> FamiliarityPrompt:
    prompt = record.get("prompt", record.get("text"))
    if not isinstance(prompt, str) or not prompt.strip():
        keys = ", ".join(map(str, record)) or "none"
        raise InputError(f'{where}: must have a "prompt" with text, got the keys {keys}')
    lists = {key: _texts(record, key, where) for key in ("specific", "generic", "references", "subtle")}
    for key, needed in (("generic", "specific"), ("subtle", "references")):
        if lists[key] and not lists[needed]:
            raise InputError(f'{where}: "{key}" needs "{needed}". Add "{needed}".')
    return FamiliarityPrompt(prompt, **lists, id=str(record.get("id", "")), group=str(record.get("group", "")))


def _texts(record: Record, key: str, where: str) -> tuple[str, ...]:
    value = record.get(key)
    if value is None:
        return ()
    listed = list(value) if not isinstance(value, str) and hasattr(value, "__iter__") else [value]
    if not all(isinstance(one, str) and one.strip() for one in listed):
        raise InputError(f'{where}: "{key}" must be a list of texts')
    return tuple(listed)
