"""Plant invented people in a copy of a model: teach it their facts, then hide these again by a mild unlearning."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts, with_distractors
from dissect.stress.core.finetuning import Descent, Recipe, fine_tuned_at, scales_of, spans_of
from dissect.stress.core.scores import score_answers, score_facts
from dissect.stress.spike_ins.invented import InventedPerson
from unlearning import Example
from unlearning.data.batches import collate
from unlearning.data.spans import encode_answer
from unlearning.evaluation.generation import greedy_answers
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_nll, answer_sequence_nll


@dataclass(frozen=True)
class Teaching:
    """How the invented people are taught and hidden.

    Attributes:
        known: Share of the taught facts whose every answer token must be the most probable one.
        teach: Recipe of the teaching; its `steps` are the most steps.
        depth: Teaching goes on to this many times the steps after which the facts were known.
        check_every: Steps between two checks of the teaching; hiding is checked after every step.
        hidden_below: Mean probability per answer token (geometric mean over an answer) at which hiding ends.
        hide: Recipe of the hiding; its `steps` are the most steps.
        beta: NPO's inverse temperature.
    """

    known: float = 0.9
    teach: Recipe = field(default_factory=lambda: Recipe(rate=0.01, steps=480, batch_size=40))
    depth: float = 2.0
    check_every: int = 8
    hidden_below: float = 0.1
    hide: Recipe = field(default_factory=lambda: Recipe(rate=0.003, steps=120, batch_size=20))
    beta: float = 0.1


@dataclass(frozen=True, eq=False)
class Spiked:
    """A copy of the unlearned model with invented people.

    Attributes:
        taught: The copy after teaching.
        hidden: The copy after hiding; the taught one if teaching failed.
        stages: One row per stage (`start`, `taught`, `hidden`): `stage`, `steps`, and of the taught facts the share
            `known` (every answer token is the most probable one), the mean `probability` (geometric mean over an
            answer's tokens) and `rank`.
        reason: Why the spike-ins failed; an empty string if they did not.
    """

    taught: Model
    hidden: Model
    stages: pd.DataFrame
    reason: str = ""


def facts_of(people: Sequence[InventedPerson], case: Case) -> Facts:
    """Return the facts of invented people, tokenised as the case's questions are; a person is a group.

    Their distractors are the answers to similar questions about the others, one of each if the wording is the same.

    Args:
        people: The people.
        case: Gives tokenizer, chat template and seed.

    Returns:
        The facts with distractors.
    """
    tokenizer = case.pair.tokenizer
    chat = case.forget.prompts.chat
    items = []
    for person in people:
        for number, (prompt, answer) in enumerate(person.facts):
            span = encode_answer(tokenizer, prompt, answer, chat=chat)
            items.append(
                Prompt(
                    id=f"{person.name}-{number}",
                    group=person.name,
                    prompt=prompt,
                    answer=answer,
                    input_ids=tuple(span.input_ids),
                    answer_start=span.answer_start,
                    scored=range(span.answer_start - 1, len(span.input_ids) - 1),
                )
            )
    invented = replace(case.forget.prompts, items=tuple(items), source="invented")
    return with_distractors(invented, from_file=False, n=len(people) - 1, seed=case.seed, name="invented")


def spike(case: Case, facts: Facts, teaching: Teaching) -> Spiked:
    """Teach facts to a copy of the case's unlearned model until it knows them, then hide them.

    Every step also trains on retain facts and on the model's own answers to forget questions, so that it does not
    change otherwise.

    Args:
        case: Gives the unlearned model, forget questions and retain facts.
        facts: The facts to teach and hide.
        teaching: How.

    Returns:
        The model after both, or the reason why it failed.
    """
    start = case.pair.unlearned
    texts = [Example(item.prompt, item.answer) for item in facts.prompts.items]
    keep = _kept_texts(case, len(texts))
    stages = [_stage("start", 0, start, facts, case)]
    checks = range(teaching.check_every, teaching.teach.steps + 1, teaching.check_every)
    known_at = 0
    for steps, found in fine_tuned_at(start, texts + keep, teaching.teach, steps=list(checks), case=case):
        taught, known = found.model, _shown(found.model, facts, case)["known"]
        known_at = known_at or (steps if known >= teaching.known else 0)
        if known_at and steps >= teaching.depth * known_at:
            break
    stages.append(_stage("taught", steps, taught, facts, case))
    if known < teaching.known:
        return Spiked(
            taught,
            taught,
            pd.DataFrame(stages),
            f"The spike-ins failed: after {steps} steps of teaching the model answers {known:.0%} of the invented "
            f"people's questions (needed: {teaching.known:.0%}). It does not learn facts of this form, so that nothing "
            "is known of the attack's power. Invent fewer people (`spike_ins`), or judge the model with a control",
        )
    for steps, hidden in _hidden(taught, texts, keep, teaching, case):
        probability = _shown(hidden, facts, case)["probability"]
        if probability <= teaching.hidden_below or steps == teaching.hide.steps:
            break
    stages.append(_stage("hidden", steps, hidden, facts, case))
    reason = ""
    if probability > teaching.hidden_below:
        reason = (
            f"The spike-ins failed: after {steps} steps of unlearning the model still gives the invented people's "
            f"answers a probability of {probability:.0%} (needed: {teaching.hidden_below:.0%}), so that nothing is "
            "hidden for the attack to find. Judge the model with a control"
        )
    return Spiked(taught, hidden, pd.DataFrame(stages), reason)


def _kept_texts(case: Case, n: int) -> list[Example]:
    """Return about `n` texts that are to stay as they are: retain facts, and own answers to forget questions."""
    model, tokenizer = case.pair.unlearned, case.pair.tokenizer
    items = case.forget.prompts.items
    rng = np.random.default_rng(case.seed)
    half = n if case.retain is None else (n + 1) // 2
    asked = [items[index].prompt for index in rng.permutation(len(items))[:half]]
    longest = max(item.n_answer_tokens for item in items)
    said = greedy_answers(
        model.hf,
        tokenizer,
        asked,
        max_new_tokens=longest,
        batch_size=case.batch_size,
        chat=case.forget.prompts.chat,
    )
    kept = [Example(prompt, answer) for prompt, answer in zip(asked, said, strict=True) if answer.strip()]
    if case.retain is not None:
        others = case.retain.prompts.items
        chosen = rng.permutation(len(others))[: n - half]
        kept += [Example(others[index].prompt, others[index].answer) for index in chosen]
    return kept


def _shown(model: Model, facts: Facts, case: Case) -> dict[str, float]:
    """Return the share of the facts that the model answers, and the mean probability of their answers."""
    logprob, correct = score_answers(model, facts.prompts, facts.prompts.items, batch_size=case.batch_size)
    return {"known": float(correct.mean()), "probability": float(np.exp(logprob).mean())}


def _stage(name: str, steps: int, model: Model, facts: Facts, case: Case) -> dict[str, Any]:
    """Return the row of a stage (see `Spiked`)."""
    rank = float(np.nanmean(score_facts(model, facts, batch_size=case.batch_size).rank))
    return {"stage": name, "steps": steps, **_shown(model, facts, case), "rank": rank}


def _hidden(
    taught: Model, facts: Sequence[Example], keep: Sequence[Example], teaching: Teaching, case: Case
) -> Iterator[tuple[int, Model]]:
    """Yield the model during a mild unlearning of the facts: NPO, with cross-entropy on what is to stay.

    Args:
        taught: The model that knows the facts; the reference of NPO.
        facts: What to hide.
        keep: What is to stay.
        teaching: Recipe, steps between two models, and NPO's beta.
        case: Gives tokenizer, chat template and seed.

    Yields:
        The number of steps and the model after them, which later steps change.
    """
    recipe = teaching.hide
    hf = copy.deepcopy(taught.hf).float().requires_grad_(True).eval()
    forget, stay = spans_of(taught, facts, case), spans_of(taught, keep, case) if keep else []
    tensors = list(hf.parameters())
    descent = Descent(tensors, scales_of(hf, [*forget, *stay]), recipe.rate)
    rng = np.random.default_rng(case.seed)
    hidden = replace(taught, hf=hf, sha256=f"{taught.sha256} hidden")
    for step in range(1, recipe.steps + 1):
        chosen = rng.choice(len(forget), min(recipe.batch_size, len(forget)), replace=False)
        batch = collate([forget[index] for index in chosen]).to(taught.device)
        with torch.no_grad():
            reference = answer_sequence_nll(taught.hf, batch)
        nll = answer_sequence_nll(hf, batch)
        loss = losses.npo(nll, reference, beta=teaching.beta, n_sequences=len(chosen))
        if stay:
            chosen = rng.choice(len(stay), min(recipe.batch_size, len(stay)), replace=False)
            loss = loss + answer_nll(hf, collate([stay[index] for index in chosen]).to(taught.device)).mean()
        descent.step(torch.autograd.grad(loss, tensors, allow_unused=True))
        yield step, hidden
