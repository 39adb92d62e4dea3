"""Spike-ins: invented people in a copy of the unlearned model give an attack its own zero, ceiling and power there.

    hidden        invented people whose facts the copy was taught and then made to hide: what the attack can find
    never shown   invented people of whom the copy was told nothing: what the attack finds where there is nothing

All of them go through the attack as the user's own facts do, in the copy and, before anybody is planted, in the model
itself, where the hidden people are as unknown as the others. With r the mean rank under the attack,

    zero    = r of the people whom the attacked model was never shown: all in the model, the never shown in the copy
    gain    = r of the hidden people in the copy - r of the same people in the model
    score   = (r of the user's facts - zero) / gain

The score is 0 where the attack finds as little as of people who do not exist, and 1 where it finds as much as of facts
that were hidden a moment ago (ceiling = zero + gain). It needs neither a base nor a control, and takes nothing from
other models. Both terms of the gain are of the same questions, answers and distractors, so that an invented answer
that happens to suit its question cancels.

People are hidden by a mild unlearning (NPO with cross-entropy on what is to stay, 2404.05868), so the ceiling is that
of suppressed knowledge, and not that of knowledge that is still shown.
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
from dissect.prompts.chat import chat_of
from dissect.prompts.prompts import Prompt, Prompts
from dissect.scoring.run_result import Copied
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import N_DISTRACTORS, Facts, with_distractors
from dissect.stress.core.finetuning import Descent, Recipe, fine_tuned_at, scales_of, spans_of
from dissect.stress.core.invented import InventedPerson, invented_people
from dissect.stress.core.result import DRAWS, PLAIN, StressResult
from dissect.stress.core.scores import MEASURES, score_answers, score_facts
from dissect.stress.deranged import deranged_relearning
from dissect.stress.relearning import relearn_disjoint, same_exposure
from unlearning import Example
from unlearning.common.bootstrap import LEVEL, Estimate, times_drawn
from unlearning.common.errors import check_at_least
from unlearning.data.batches import collate
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

MODEL, COPY = "model", "copy"
"""The attacked models, values of the column `model`: the user's unlearned model, and its copy with planted people."""

COLUMNS = ("attack", "facts", "model", "stage", "measure", "example", "group", "value")
"""Columns of `SpikeIns.frame`."""

Attack = Callable[[Case], StressResult]

ATTACKS: Mapping[str, Attack] = {"relearn_disjoint": relearn_disjoint, "deranged_relearning": deranged_relearning}
"""The default attacks by name."""

_ONE_SIDED = 1.645
"""Standard normal quantile of .95."""


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
        zero: Mean rank under the attack of people whom the attacked model was never shown.
        ceiling: Zero, plus what planting and hiding added to the hidden people's mean rank under the attack.
        user: Mean rank of the user's facts under the attack.
        score: (user - zero) / (ceiling - zero); None if the attack does not find the hidden people.
        power: Share of the hidden people who were found: planting added more to their rank under the attack than it
            adds to that of 95 % of the never shown (normal approximation).
        moved: What planting added to the rank of the never shown people, which should be about 0.

    All intervals are over people.
    """

    attack: str
    zero: Estimate
    ceiling: Estimate
    user: Estimate
    score: Estimate | None
    power: float
    moved: Estimate


@dataclass(eq=False, kw_only=True)
class SpikeIns:
    """What attacks find of invented people in the user's own model, and of the user's facts.

    Attributes:
        frame: One row per attack, set of facts (`hidden`, `never shown`, `forget`: the user's), attacked model
            (`model`, or its `copy` with planted people), stage (`before` the attack or `attacked`), measure and
            example, with the columns `COLUMNS`.
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
            for name in ("zero", "ceiling", "user", "score", "moved"):
                estimate = getattr(scale, name)
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

    def parts(self) -> dict[str, pd.DataFrame]:
        """Return the tables by the names of their files in a run directory."""
        return {"spike_ins": self.frame, "spike_ins--stages": self.stages, "spike_ins--people": self.people}

    def record(self) -> dict[str, Any]:
        """Return everything but the tables, as plain data for JSON."""
        return {"settings": self.settings, "seconds": self.seconds, "seed": self.seed, "reason": self.reason}

    @classmethod
    def from_parts(cls, record: Mapping[str, Any], parts: Mapping[str, pd.DataFrame]) -> "SpikeIns":
        """Put spike-ins together from what `record` and `parts` gave."""
        return cls(
            frame=parts["spike_ins"], stages=parts["spike_ins--stages"], people=parts["spike_ins--people"], **record
        )


def spike_ins(
    case: Case,
    *,
    n: int = N_PEOPLE,
    attacks: Mapping[str, Attack] | None = None,
    teaching: Teaching | None = None,
    found: Mapping[str, StressResult] | None = None,
    prompts: Prompts | None = None,
) -> SpikeIns:
    """Teach invented people to a copy of the unlearned model, hide them again, and attack them and the user's facts.

    Args:
        case: Models and facts; only the unlearned model is used.
        n: Number of invented people; half of them are taught and hidden, the others never shown.
        attacks: The attacks by name; each takes a case, and attacks the role `case.only`.
        teaching: How people are taught and hidden.
        found: Results of the same attacks on the user's facts by name, if they are known already.
        prompts: The prompts to invent people from, where the case holds only some of them; by default the case's.

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
    attacks = ATTACKS if attacks is None else attacks
    texts = [] if case.retain is None else [f"{item.prompt}\n{item.answer}" for item in case.retain.prompts.items]
    people = invented_people(prompts or case.forget.prompts, n, seed=case.seed, known=texts)
    set_of = {person.name: HIDDEN if number < n // 2 else NEVER_SHOWN for number, person in enumerate(people)}
    facts = facts_of(people, case)
    planted = [index for index, group in enumerate(facts.groups) if set_of[group] == HIDDEN]
    items = [facts.prompts.items[index] for index in planted]
    facts = same_exposure(facts, [f"{item.prompt} {item.answer}" for item in items])
    facts = Facts(facts.prompts, tuple(others[:N_DISTRACTORS] for others in facts.distractors))
    spiked = spike(case, facts.select(planted), teaching)
    frames = []
    for name, attack in attacks.items() if not spiked.reason else ():
        theirs = (found or {}).get(name) or attack(replace(case, only="unlearned"))
        frames.append(_rows_of(theirs).assign(attack=name, facts=USER, model=MODEL))
        for model, unlearned in ((MODEL, case.pair.unlearned), (COPY, spiked.hidden)):
            pair = ModelPair(spiked.taught, unlearned)
            own = attack(replace(case, pair=pair, control=None, forget=facts, only="unlearned"))
            rows = _rows_of(own)
            frames.append(rows.assign(attack=name, facts=rows["group"].map(set_of), model=model))
    table = [
        {"facts": set_of[person.name], "name": person.name, "prompt": prompt, "answer": answer}
        for person in people
        for prompt, answer in person.facts
    ]
    return SpikeIns(
        frame=pd.concat(frames, ignore_index=True)[list(COLUMNS)] if frames else pd.DataFrame(columns=list(COLUMNS)),
        stages=spiked.stages,
        people=pd.DataFrame(table),
        settings={"n": n, "attacks": list(attacks), "teaching": asdict(teaching)},
        seconds=time.perf_counter() - started,
        seed=case.seed,
        reason=spiked.reason,
    )


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
    chat = chat_of(case.forget.prompts.items[0], tokenizer)
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
        add_special_tokens=chat_of(case.forget.prompts.items[0], tokenizer) is None,
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


def _rows_of(result: StressResult) -> pd.DataFrame:
    """Return the rows of a result's unlearned model before and under its strongest variant, with their `stage`."""
    frame = result.frame
    frame = frame[frame["role"] == "unlearned"]
    decides = frame[(frame["measure"] == result.measure) & (frame["variant"] != PLAIN)]
    strongest = decides.groupby("variant")["value"].mean().idxmax()
    rows = frame[frame["variant"].isin([PLAIN, strongest])]
    return rows.assign(stage=np.where(rows["variant"] == PLAIN, "before", "attacked"))


def _scale(attack: str, rows: pd.DataFrame, seed: int) -> Scale:
    """Return the scale of one attack from its rows of the frame."""
    ranks = rows[(rows["measure"] == MEASURES[0]) & (rows["stage"] == "attacked")]
    user = ranks[ranks["facts"] == USER].dropna(subset="value")
    invented = ranks[ranks["facts"] != USER].pivot(index=["facts", "group", "example"], columns="model", values="value")
    invented = invented.dropna().groupby(level=["facts", "group"]).mean()  # one row per person
    people = invented[[MODEL, COPY]]
    hidden, never = (
        people[people.index.get_level_values("facts") == name].to_numpy() for name in (HIDDEN, NEVER_SHOWN)
    )
    unknown = hidden[:, 0], never.mean(axis=1)
    added, moved = (of_person[:, 1] - of_person[:, 0] for of_person in (hidden, never))

    def draws(number: int, n: int) -> Float[np.ndarray, "draw person"]:
        """Return how often each person is drawn: first as the data are, then in every bootstrap draw."""
        drawn = times_drawn(np.arange(n), draws=DRAWS, seed=[seed, number])
        return np.concatenate([np.ones((1, n)), drawn]) / n

    of_hidden, of_never = draws(0, len(hidden)), draws(1, len(never))
    persons = user.groupby("group")["value"].agg(["sum", "size"]) if user["group"].ne("").all() else None
    if persons is None:  # facts without a group are groups of one
        persons = pd.DataFrame({"sum": user["value"], "size": 1})
    of_user = draws(2, len(persons))
    n_people = len(hidden) + len(never)
    zero = (of_hidden @ unknown[0] * len(hidden) + of_never @ unknown[1] * len(never)) / n_people
    gain = of_hidden @ added
    theirs = (of_user @ persons["sum"].to_numpy()) / (of_user @ persons["size"].to_numpy())
    found = np.quantile(gain[1:], (1 - LEVEL) / 2) > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        score = _estimate((theirs - zero) / gain, len(persons)) if found else None
    return Scale(
        attack=attack,
        zero=_estimate(zero, n_people),
        ceiling=_estimate(zero + gain, len(hidden)),
        user=_estimate(theirs, len(persons)),
        score=score,
        power=float((added > moved.mean() + _ONE_SIDED * moved.std(ddof=1)).mean()),
        moved=_estimate(of_never @ moved, len(never)),
    )


def _estimate(values: Float[np.ndarray, " draw"], n: int) -> Estimate:
    """Return the first value with the interval of the others."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high), n)


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
            f"{text} It does not find the planted people, so that in this model it can show nothing. Plant more people "
            "(`spike_ins`) or use another attack."
        )
    score = scale.score
    return f"{text} On the scale between the two that is {score.value:.2f} [{score.low:.2f}, {score.high:.2f}]."
