"""Spike-ins: invented people in a copy of the unlearned model give an attack its own zero, ceiling and power there.

    hidden        invented people whose facts the copy was taught and then made to hide: what the attack can find
    never shown   invented people of whom the copy was told nothing: what the attack finds where there is nothing

Each half is put through the attack as the user's own facts are, alone. The score of the user's facts on this scale is

    (attacked user's facts - attacked never shown) / (attacked hidden - attacked never shown)

0 where the attack finds as little as of people that do not exist, 1 where it finds as much as of what was hidden a
moment ago. It needs neither a base nor a control, and takes nothing from other models.

Spike-ins are hidden by a mild unlearning (NPO, 2404.05868), so the ceiling is that of suppressed knowledge, and not
that of knowledge that is still shown.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from dissect.models.model import Model
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Prompt, Prompts
from dissect.scoring.run_result import Copied
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts, with_distractors
from dissect.stress.core.finetuning import Descent, Recipe, fine_tuned_at, scales_of, spans_of
from dissect.stress.core.invented import InventedPerson, invented_people
from dissect.stress.core.result import DRAWS, PLAIN, StressResult
from dissect.stress.core.scores import MEASURES, score_facts
from dissect.stress.relearning import relearn_disjoint
from unlearning import Example
from unlearning.common.bootstrap import LEVEL, Estimate, clusters, times_drawn
from unlearning.common.errors import InputError, check_at_least
from unlearning.data.batches import collate
from unlearning.data.chat import chat_format
from unlearning.data.spans import encode_answer
from unlearning.evaluation.generation import greedy_answers
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_nll, answer_sequence_nll

N_PEOPLE = 20
"""Default number of invented people; half of them are taught and hidden."""

FEWEST = 4
"""Smallest number of invented people: the attack teaches half of a half and asks the rest."""

HIDDEN, NEVER_SHOWN, USER = "hidden", "never shown", "forget"
"""The three sets of facts, values of the column `facts`."""

COLUMNS = ("attack", "facts", "stage", "measure", "example", "group", "value")
"""Columns of `SpikeIns.frame`."""

Attack = Callable[[Case], StressResult]

_ONE_SIDED = 1.645
"""Standard normal quantile of .95."""


@dataclass(frozen=True)
class Teaching:
    """How the invented people are taught and hidden.

    Attributes:
        known: Share of the taught facts whose every answer token must be the most probable one.
        teach: Recipe of the teaching; its `steps` are the most steps.
        check_every: Steps between two checks.
        hidden_below: Mean probability per answer token (geometric mean over an answer) at which hiding ends.
        hide: Recipe of the hiding; its `steps` are the most steps.
        beta: NPO's inverse temperature.
    """

    known: float = 0.9
    teach: Recipe = field(default_factory=lambda: Recipe(rate=0.01, steps=480, batch_size=40))
    check_every: int = 24
    hidden_below: float = 0.1
    hide: Recipe = field(default_factory=lambda: Recipe(rate=0.003, steps=120, batch_size=20))
    beta: float = 0.1


@dataclass(frozen=True, eq=False)
class Spiked:
    """A copy of the unlearned model with invented people.

    Attributes:
        taught: The copy after teaching.
        hidden: The copy after hiding; the taught one if teaching failed.
        stages: One row per stage: `stage`, `steps`, and of the taught facts the share `known` (every answer token is
            the most probable one), the mean `probability` (geometric mean over an answer's tokens) and `rank`.
        reason: Why the spike-ins failed; an empty string if they did not.
    """

    taught: Model
    hidden: Model
    stages: pd.DataFrame
    reason: str = ""


@dataclass(frozen=True)
class Scale:
    """Where the user's facts stand between what never was there and what was hidden a moment ago.

    Attributes:
        attack: Name of the attack.
        zero: Mean rank of the never shown people's facts under the attack, with its interval over people.
        ceiling: The same of the hidden people's facts.
        user: The same of the user's facts.
        score: (user - zero) / (ceiling - zero), with its interval over people of all three sets; None if the attack
            does not find more of the hidden people than of the never shown.
        power: Share of the hidden people whose mean rank is above that of 95 % of never shown people (normal
            approximation).
    """

    attack: str
    zero: Estimate
    ceiling: Estimate
    user: Estimate
    score: Estimate | None
    power: float


@dataclass(eq=False, kw_only=True)
class SpikeIns:
    """What attacks find of invented people in the user's own model, and of the user's facts.

    Attributes:
        frame: One row per attack, set of facts (`hidden`, `never shown`, `forget`: the user's), stage (`before` the
            attack or `attacked`), measure and example, with the columns `COLUMNS`.
        stages: How teaching and hiding went (see `Spiked`).
        people: The invented people's `facts` (their set), `name`, `prompt` and `answer`.
        settings: Everything that the numbers depend on besides models and facts.
        seconds: Wall time in seconds.
        seed: Random seed of the bootstrap draws.
        reason: Why the spike-ins failed; an empty string if they did not.
    """

    frame: Copied[pd.DataFrame] = Copied()
    stages: Copied[pd.DataFrame] = Copied()
    people: Copied[pd.DataFrame] = Copied()
    settings: Copied[dict[str, Any]] = Copied()
    seconds: float
    seed: int = 0
    reason: str = ""

    def scales(self) -> list[Scale]:
        """Return the scale of every attack, in the order in which they ran; none if the spike-ins failed."""
        frame = self.frame
        return [_scale(str(attack), rows, self.seed) for attack, rows in frame.groupby("attack", sort=False)]

    def table(self) -> pd.DataFrame:
        """Return one row per attack and number: `attack`, `number`, `value`, `low`, `high`, `n`."""
        rows = []
        for scale in self.scales():
            numbers = {"zero": scale.zero, "ceiling": scale.ceiling, "user": scale.user, "score": scale.score}
            for name, estimate in numbers.items():
                if estimate is not None:
                    rows.append({"attack": scale.attack, "number": name, **asdict(estimate)})
            n = len({*self.people.query("facts == @HIDDEN")["name"]})
            power = {"number": "power", "value": scale.power, "low": np.nan, "high": np.nan, "n": n}
            rows.append({"attack": scale.attack, **power})
        return pd.DataFrame(rows, columns=["attack", "number", "value", "low", "high", "n"])

    def sentences(self) -> list[str]:
        """Return what the spike-ins say, one sentence or two per attack."""
        if self.reason:
            return [self.reason]
        return [sentence(scale) for scale in self.scales()]


def spike_ins(
    case: Case,
    *,
    n: int = N_PEOPLE,
    attacks: Mapping[str, Attack] | None = None,
    teaching: Teaching | None = None,
    found: Mapping[str, StressResult] | None = None,
) -> SpikeIns:
    """Teach invented people to a copy of the unlearned model, hide them again, and attack them and the user's facts.

    Args:
        case: Models and facts; only the unlearned model is used.
        n: Number of invented people; half of them are taught and hidden, the others never shown.
        attacks: The attacks by name; each takes a case and attacks the role `case.only`. By default the verdict's
            `relearn_disjoint`.
        teaching: How people are taught and hidden.
        found: Results of the same attacks on the user's facts, if they are known already.

    Returns:
        What the attacks found, or why the spike-ins failed.

    Raises:
        InputError: `n` is below `FEWEST`, or no people can be invented (see `invented_people`).

    Examples:
        >>> from dissect import load_pair, load_prompts
        >>> from dissect.stress.core.case import make_case
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo", progress=False)
        >>> forget, retain = (load_prompts(question_set(name), pair.tokenizer) for name in ("forget", "retain"))
        >>> case = make_case(pair, forget, retain=retain)
        >>> spike_ins(case.at_most(120), n=20).sentences()  # doctest: +SKIP
    """
    started = time.perf_counter()
    check_at_least("n", n, FEWEST)
    teaching = teaching or Teaching()
    attacks = {"relearn_disjoint": relearn_disjoint} if attacks is None else attacks
    texts = [] if case.retain is None else [f"{item.prompt}\n{item.answer}" for item in case.retain.prompts.items]
    people = invented_people(case.forget.prompts, n, seed=case.seed, known=texts)
    of_set = {HIDDEN: people[: n // 2], NEVER_SHOWN: people[n // 2 :]}
    sets = {name: facts_of(some, case, name) for name, some in of_set.items()}
    spiked = spike(case, sets[HIDDEN], teaching)
    frames = []
    for name, attack in attacks.items() if not spiked.reason else ():
        theirs = (found or {}).get(name) or attack(replace(case, only="unlearned"))
        frames.append(_attacked_rows(name, USER, theirs))
        pair = ModelPair(spiked.taught, spiked.hidden)
        for facts in (HIDDEN, NEVER_SHOWN):
            own = replace(case, pair=pair, control=None, forget=sets[facts], only="unlearned")
            frames.append(_attacked_rows(name, facts, attack(own)))
    return SpikeIns(
        frame=pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS)),
        stages=spiked.stages,
        people=pd.DataFrame(
            [
                {"facts": name, "name": person.name, "prompt": prompt, "answer": answer}
                for name, some in of_set.items()
                for person in some
                for prompt, answer in person.facts
            ]
        ),
        settings={"n": n, "attacks": list(attacks), "teaching": asdict(teaching)},
        seconds=time.perf_counter() - started,
        seed=case.seed,
        reason=spiked.reason,
    )


def facts_of(people: Sequence[InventedPerson], case: Case, name: str = "invented") -> Facts:
    """Return the facts of invented people, tokenised as the case's questions are; a person is a group.

    Their distractors are answers to the same people's similar questions.

    Args:
        people: The people.
        case: Gives tokenizer, chat template and seed.
        name: Name of the set in ids.

    Returns:
        The facts with distractors.
    """
    tokenizer, prompts = case.pair.tokenizer, case.forget.prompts
    first = prompts.items[0]
    of_a_chat = encode_answer(tokenizer, first.prompt, first.answer).input_ids != list(first.input_ids)
    chat = chat_format(tokenizer) if of_a_chat else None
    items = []
    for person in people:
        for number, (prompt, answer) in enumerate(person.facts):
            span = encode_answer(tokenizer, prompt, answer, chat=chat)
            items.append(
                Prompt(
                    id=f"{name}-{person.name}-{number}",
                    group=person.name,
                    prompt=prompt,
                    answer=answer,
                    input_ids=tuple(span.input_ids),
                    answer_start=span.answer_start,
                    scored=range(span.answer_start - 1, len(span.input_ids) - 1),
                )
            )
    invented = Prompts(items=tuple(items), scoring="answer", pad_token_id=prompts.pad_token_id, source=name)
    return with_distractors(invented, from_file=False, seed=case.seed, name=name)


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
    taught_texts = [Example(item.prompt, item.answer) for item in facts.prompts.items]
    keep = _kept_texts(case, len(taught_texts))
    stages = [{"stage": "start", "steps": 0, **_state(start, facts, case)}]
    checks = range(teaching.check_every, teaching.teach.steps + 1, teaching.check_every)
    taught, state = start, stages[0]
    for steps, found in fine_tuned_at(start, taught_texts + keep, teaching.teach, steps=list(checks), case=case):
        taught, state = found.model, _state(found.model, facts, case)
        if state["known"] >= teaching.known:
            break
    stages.append({"stage": "taught", "steps": steps, **state})
    if state["known"] < teaching.known:
        return Spiked(
            taught,
            taught,
            pd.DataFrame(stages),
            f"The spike-ins failed: after {steps} steps of teaching the model answers {state['known']:.0%} of the "
            f"invented people's questions (needed: {teaching.known:.0%}). It does not learn facts of this form, so that "
            "nothing is known of the attack's power. Ask for fewer invented people (`spike_ins`), or judge the model "
            "with a control",
        )
    hidden = taught
    for steps, model in _hidden(taught, taught_texts, keep, teaching, case):
        hidden, state = model, _state(model, facts, case)
        if state["probability"] <= teaching.hidden_below:
            break
    stages.append({"stage": "hidden", "steps": steps, **state})
    reason = ""
    if state["probability"] > teaching.hidden_below:
        reason = (
            f"The spike-ins failed: after {steps} steps of unlearning the model still gives the invented people's "
            f"answers a probability of {state['probability']:.0%} (needed: {teaching.hidden_below:.0%}), so that "
            "nothing is hidden for the attack to find. Judge the model with a control"
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
        add_special_tokens=not _is_chat(case),
    )
    kept = [Example(prompt, answer) for prompt, answer in zip(asked, said, strict=True) if answer.strip()]
    if case.retain is not None:
        others = case.retain.prompts.items
        chosen = rng.permutation(len(others))[: n - half]
        kept += [Example(others[index].prompt, others[index].answer) for index in chosen]
    return kept


def _is_chat(case: Case) -> bool:
    """Return whether the prompts were wrapped by a chat template, which adds its own special tokens."""
    item = case.forget.prompts.items[0]
    return encode_answer(case.pair.tokenizer, item.prompt, item.answer).input_ids != list(item.input_ids)


def _state(model: Model, facts: Facts, case: Case) -> dict[str, float]:
    """Return the share of the facts that the model knows, and their mean probability and rank."""
    scores = score_facts(model, facts, batch_size=case.batch_size)
    return {
        "known": float(scores.correct.mean()),
        "probability": float(np.exp(scores.logprob).mean()),
        "rank": float(np.nanmean(scores.rank)),
    }


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
        The number of steps and a copy of the model after them.
    """
    recipe = teaching.hide
    hf = copy.deepcopy(taught.hf).float().requires_grad_(True).eval()
    forget, stay = spans_of(taught, facts, case), spans_of(taught, keep, case) if keep else []
    tensors = list(hf.parameters())
    descent = Descent(tensors, scales_of(hf, [*forget, *stay]), recipe.rate)
    rng = np.random.default_rng(case.seed)
    every = max(1, teaching.check_every // 6)
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
        for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
            tensor.grad = gradient
        descent.step()
        if step % every == 0 or step == recipe.steps:
            yield step, replace(taught, hf=copy.deepcopy(hf).requires_grad_(False), sha256=f"{taught.sha256} hidden")


def _attacked_rows(attack: str, facts: str, result: StressResult) -> pd.DataFrame:
    """Return the rows of a result's unlearned model before and under its strongest variant."""
    frame = result.frame
    frame = frame[frame["role"] == "unlearned"]
    decides = frame[(frame["measure"] == result.measure) & (frame["variant"] != PLAIN)]
    strongest = decides.groupby("variant")["value"].mean().idxmax()
    rows = frame[frame["variant"].isin([PLAIN, strongest])]
    stage = np.where(rows["variant"] == PLAIN, "before", "attacked")
    return rows.assign(attack=attack, facts=facts, stage=stage)[list(COLUMNS)]


def _scale(attack: str, rows: pd.DataFrame, seed: int) -> Scale:
    """Return the scale of one attack from its rows of the frame."""
    rank = rows[(rows["measure"] == MEASURES[0]) & (rows["stage"] == "attacked") & rows["value"].notna()]
    values, draws, people = {}, {}, {}
    for number, facts in enumerate((NEVER_SHOWN, HIDDEN, USER)):
        of_set = rank[rank["facts"] == facts]
        values[facts], draws[facts] = _mean(of_set, seed=(seed, number))
        people[facts] = of_set.groupby("group")["value"].mean().to_numpy()
    zero, ceiling, user = (values[facts] for facts in (NEVER_SHOWN, HIDDEN, USER))
    spread = float(people[NEVER_SHOWN].std(ddof=1))
    found = people[HIDDEN] > zero.value + _ONE_SIDED * spread
    gap = draws[HIDDEN] - draws[NEVER_SHOWN]
    score = None
    if np.quantile(gap, (1 - LEVEL) / 2) > 0:
        drawn = (draws[USER] - draws[NEVER_SHOWN]) / gap
        low, high = np.quantile(drawn[np.isfinite(drawn)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        value = (user.value - zero.value) / (ceiling.value - zero.value)
        score = Estimate(float(value), float(low), float(high), user.n)
    return Scale(attack, zero, ceiling, user, score, float(found.mean()))


def _mean(rows: pd.DataFrame, *, seed: Sequence[int]) -> tuple[Estimate, Float[np.ndarray, " draw"]]:
    """Return the mean value with its interval, and the means of the bootstrap draws over groups."""
    values = rows["value"].to_numpy(dtype=np.float64)
    weights = times_drawn(clusters(rows["group"].tolist()), draws=DRAWS, seed=list(seed))
    draws = weights @ values / weights.sum(axis=1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high), len(values)), draws


def sentence(scale: Scale) -> str:
    """Return what an attack's scale says, in words.

    Args:
        scale: The scale.

    Returns:
        One or two sentences with numbers.
    """

    def above_chance(rank: Estimate) -> str:
        share, low, high = (2 * value - 1 for value in (rank.value, rank.low, rank.high))
        return f"{share:.0%} [{low:.0%}, {high:.0%}]"

    text = (
        f"In this model {scale.attack} brings back {above_chance(scale.ceiling)} of what was planted and hidden, and "
        f"{above_chance(scale.zero)} of what was never there; of the forget facts {above_chance(scale.user)} (rank "
        "above chance, as a share of its maximum)."
    )
    if scale.score is None:
        return (
            f"{text} It does not tell the planted people from people who were never there, so that in this model it "
            "can show nothing."
        )
    score = scale.score
    return f"{text} On the scale between the two that is {score.value:.2f} [{score.low:.2f}, {score.high:.2f}]."
