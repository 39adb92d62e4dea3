"""Who's Harry Potter's two familiarity scores (2310.02238), on prompts of one's own.

A record has a `prompt`, and

* `specific` and `generic`: candidates for what comes next (probability form), or
* `references` and `subtle`: names and ideas, and themes, of the text (completion form, judged by rule), or
* all of them; or neither, where a judge is given.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unlearning.common.errors import InputError
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
        prompt: what the model goes on with.
        specific, generic: candidates for what comes next; empty where it is for the completion form only.
        references: names and ideas that only the text has.
        subtle: themes typical of it.
        id, group: of the record.
    """

    prompt: str
    specific: tuple[str, ...] = ()
    generic: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    subtle: tuple[str, ...] = ()
    id: str = ""
    group: str = ""


def read_prompts(path: str | Path) -> list[FamiliarityPrompt]:
    """The prompts of a file.

    Raises:
        InputError: an unreadable file, a record without a prompt, candidates or names that are no list of texts,
            `generic` without `specific`, or `subtle` without `references`.
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
    """Familiarity, ready to run.

    Args:
        subject: the model.
        prompts: see `read_prompts`.
        judge: of completions, in place of the rule; then every prompt is completed.
        max_new_tokens: most tokens of a completion; the paper does not say.
        limit: the first so many prompts of each form only.
        seed: of the bootstrap.

    Raises:
        InputError: no prompt has candidates, references, or a judge.
    """
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: 1 or more")
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: 1 or more")
    with_candidates = [one for one in prompts if one.specific][:limit]
    completed = [one for one in prompts if judge is not None or one.references][:limit]
    if not with_candidates and not completed:
        raise InputError(
            'no prompt has candidates ("specific") or names of the text ("references"); write some, or give a judge'
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
        summarise=lambda rows, _retain: _metrics(rows, seed),
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
        "share": ("familiarity_share", "the same as a share of specific and generic candidates together"),
        "whole": ("familiarity_whole", "total probability of the whole specific candidates, all of their tokens"),
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
    score = "(5 * share of class 1 + share of class 2) / 5, 0 to 1; the paper's constant is not verified"
    if rows.empty:
        reason = 'no prompt has "references", and no judge is given'
        return [Metric("familiarity_completion", None, "lower is better", score, reason)]
    sample = Sample(COMPLETION, rows["group"].tolist(), seed=seed)
    classes = rows["class"].to_numpy(np.int64)
    values = np.array([CLASS_SCORES[one] for one in classes])
    metrics = [Metric("familiarity_completion", sample.mean(values), "lower is better", score)]
    for number, meaning in CLASSES.items():
        share = sample.mean((classes == number).astype(np.float64))
        direction: Any = "lower is better" if number < 3 else "describes; neither is better"
        metrics.append(Metric(f"completion_class_{number}", share, direction, f"share of completions with {meaning}"))
    return metrics


def _notes(candidates: Sequence[Candidates], *, by_rule: bool) -> tuple[str, ...]:
    notes = []
    shared = sum(some.n_shared for some in candidates)
    if shared:
        notes.append(
            f"{shared} first tokens begin specific and generic candidates alike and count for neither; "
            "familiarity_whole tells them apart"
        )
    if by_rule:
        notes.append("completions are judged by rule, which sees no paraphrase and never says class 3")
    return tuple(notes)


def _prompt(record: Record, where: str) -> FamiliarityPrompt:
    prompt = record.get("prompt", record.get("text"))
    if not isinstance(prompt, str) or not prompt.strip():
        keys = ", ".join(map(str, record)) or "none"
        raise InputError(f'{where}: needs a "prompt" with text; its keys are {keys}')
    lists = {key: _texts(record, key, where) for key in ("specific", "generic", "references", "subtle")}
    for key, needed in (("generic", "specific"), ("subtle", "references")):
        if lists[key] and not lists[needed]:
            raise InputError(f'{where}: has "{key}" and no "{needed}"; give those, too')
    return FamiliarityPrompt(prompt, **lists, id=str(record.get("id", "")), group=str(record.get("group", "")))


def _texts(record: Record, key: str, where: str) -> tuple[str, ...]:
    value = record.get(key)
    if value is None:
        return ()
    listed = list(value) if not isinstance(value, str) and hasattr(value, "__iter__") else [value]
    if not all(isinstance(one, str) and one.strip() for one in listed):
        raise InputError(f'{where}: "{key}" should be a list of texts')
    return tuple(listed)
