"""Crossover: does a model learn the truth faster than other people's answers? With an exact permutation test.

Groups are paired, and two questions of one kind, i about one group and j about the other, can be taught in two ways:
with their own answers (true) or with each other's (exchanged). Half of the pairs of groups, drawn at random, are taught
true and the other half exchanged, in one run; a second run swaps the halves. The speed of a fact is

    mean log-probability, over a short curve of steps, of the answer that is taught:  true run - exchanged run

In a pair of facts the same two questions and the same two answers stand on both sides, so that what is probable for
everybody cancels. Without the knowledge, nothing but the random halves tells true from exchanged: the test draws the
halves anew, all of them or many, and p is the share of draws in which the effect is at least as large.

The attack teaches the facts, so it is evidence of speed only (level 1). It needs neither base nor control. A negative
effect is a trace as well: a model that was taught to avoid the right answers starts further away from them, and learns
them more slowly. Of the two tests that need no control, `dissect.stress.deranged` tells more models apart.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
from jaxtyping import Float

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.finetuning import Recipe, fine_tuned_at
from dissect.stress.core.kinds import similar_questions
from dissect.stress.core.result import StressResult, value_rows
from dissect.stress.core.scores import all_answers, right_indices
from dissect.stress.core.subjects import Questions, read_questions
from unlearning import Example
from unlearning.common.errors import InputError

CURVE = (8, 16)
"""Numbers of steps after which the answers are scored. Earlier, suppressed answers are still avoided."""

RECIPE = Recipe(rate=0.01, batch_size=40)
"""Default strength; its number of steps is not used."""

EXACT = 200_000
"""Maximum number of halves that are all tried: those of up to 40 groups."""

DRAWS = 10_000
"""Number of halves that are drawn if there are more."""


ROUNDING = 1e-12
"""Differences of effects that count as ties."""


@dataclass(frozen=True)
class PairedGroups:
    """Two groups with their questions of the same kinds.

    Attributes:
        facts: Indices of two facts of one kind, the first of the one group and the second of the other.
        first: Whether the pair is taught true in the first run, and exchanged in the second.
    """

    facts: tuple[tuple[int, int], ...]
    first: bool


@dataclass(frozen=True)
class Permutation:
    """Result of a permutation test of effect > 0.

    Attributes:
        effect: Mean over facts of the speed, in nats per answer token.
        p: Share of the halves whose effect is at least as large, the drawn one included.
        p_two_sided: Share of the halves whose effect is at least as far from the mean of all.
        z: Effect in standard deviations of the effects of all halves.
        exact: Whether all halves were tried.
    """

    effect: float
    p: float
    p_two_sided: float
    z: float
    exact: bool


def crossover(case: Case, *, recipe: Recipe = RECIPE, curve: Sequence[int] = CURVE) -> StressResult:
    """Fine-tune on true answers for half of the groups and exchanged ones for the others, and compare the speeds.

    Args:
        case: Models and facts.
        recipe: Strength of the training; its `steps` are not used.
        curve: Increasing numbers of steps after which the answers are scored.

    Returns:
        The result of the test `crossover` with the measure `speed`, and the table `permutation` (`role`, `effect`, `p`,
        `p_two_sided`, `z`, `exact`, `pairs`).

    Raises:
        InputError: There are fewer than four groups with questions alike and different answers, or the curve does not
            increase from 1 or more.

    Examples:
        >>> from dissect import load_pair, load_prompts
        >>> from dissect.stress.core.case import make_case
        >>> from dissect.stress.crossover import crossover
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> case = make_case(pair, load_prompts("questions.json", pair.tokenizer), control=None)  # doctest: +SKIP
        >>> crossover(case).tables["permutation"]  # doctest: +SKIP
    """
    started = time.perf_counter()
    questions = read_questions(case.forget.prompts.items, case.forget.prompts.chat)
    pairs = pair_groups(questions, seed=case.seed)
    facts = _with_partners(case, questions, pairs)
    scored: list[tuple[str, str, Mapping[str, Float[np.ndarray, " fact"]]]] = []
    tests = []
    for role, model in case.models.items():
        speed = _speed(model, facts, pairs, recipe, curve, case)
        scored.append((role, recipe.variant, {"speed": speed}))
        tests.append({"role": role, **asdict(permutation_test(speed, pairs, seed=case.seed)), "pairs": len(pairs)})
    left_out = len(facts) - 2 * sum(len(pair.facts) for pair in pairs)
    note = f"{left_out} of {len(facts)} facts have no partner of their kind with another answer"
    return StressResult(
        test="crossover",
        level=1,
        measure="speed",
        frame=value_rows(facts, scored),
        proves=(
            "Speed only, because the attack teaches the facts. rho > 0: the model learns the truth faster than other "
            "people's answers, so something of it was left, which may be less than the facts. rho = 0: it learns "
            "both at the same speed."
        ),
        settings={"curve": list(curve), "recipe": asdict(recipe), "pairs": len(pairs)},
        seconds=time.perf_counter() - started,
        floors={"speed": 0.0},
        notes=(note,) * (left_out > 0),
        seed=case.seed,
        tables={"permutation": pd.DataFrame(tests)},
    )


def pair_groups(questions: Questions, *, seed: int = 0) -> list[PairedGroups]:
    """Pair the groups at random, and in each pair the questions that are most alike.

    Two questions are not paired if their subjects share the answer of either.

    Args:
        questions: The questions.
        seed: Random seed of the pairs and the halves.

    Returns:
        The pairs, half of them taught true in the first run.

    Raises:
        InputError: There are fewer than two pairs.
    """
    members: dict[str, list[int]] = {}
    for index, subject in enumerate(questions.subjects):
        members.setdefault(subject, []).append(index)
    alike = similar_questions(questions)
    for index, own in enumerate(questions.own):
        taken = [answer in own for answer in questions.answers]
        alike[index, taken] = alike[taken, index] = 0.0
    drawn = np.random.default_rng(seed)
    names = list(members)
    order = [members[names[number]] for number in drawn.permutation(len(names))]
    found = []
    while len(order) > 1:
        ours = order.pop()
        matched = [_matched(alike, ours, theirs) for theirs in order]
        sizes = [float(sum(alike[i, j] for i, j in facts)) for facts in matched]
        best = int(np.argmax(sizes))
        if matched[best]:
            order.pop(best)
            found.append(matched[best])
    if len(found) < 2:
        raise InputError(
            "the forget prompts must be of at least four groups whose questions are alike and have different answers, "
            f"got {len(found)} pair(s) of such groups. Give prompts of more groups, or none of them a `group`"
        )
    first = set(drawn.permutation(len(found))[: len(found) // 2].tolist())
    return [PairedGroups(tuple(facts), number in first) for number, facts in enumerate(found)]


def permutation_test(speed: Float[np.ndarray, " fact"], pairs: Sequence[PairedGroups], *, seed: int = 0) -> Permutation:
    """Test whether the truth is learnt faster, by drawing again which pairs were taught true in the first run.

    Args:
        speed: Speed of each fact; NaN for a fact in no pair.
        pairs: The pairs of groups.
        seed: Random seed of the draws, if there are too many halves to try them all.

    Returns:
        Effect and p. All halves of the same size are equally probable without the knowledge, so that a difference
        between the two runs does no harm.
    """
    total = np.array([sum(speed[index] for both in pair.facts for index in both) for pair in pairs])
    n_facts = 2 * sum(len(pair.facts) for pair in pairs)
    signs = np.array([1.0 if pair.first else -1.0 for pair in pairs])
    runs = signs * total / n_facts  # first run - second run, whatever was true in it
    n, half = len(pairs), int((signs > 0).sum())
    effect = float(signs @ runs)
    exact = comb(n, half) <= EXACT
    if exact:
        chosen = np.array(list(combinations(range(n), half)))
    else:
        chosen = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (DRAWS, 1)), axis=1)[:, :half]
    effects = 2 * runs[chosen].sum(1) - runs.sum()
    mean, spread = float(effects.mean()), float(effects.std())
    as_large, as_far = effects >= effect - ROUNDING, np.abs(effects - mean) >= abs(effect - mean) - ROUNDING
    # The half that was drawn is among all halves, but not among those that are drawn for the test.
    p, two_sided = ((int(some.sum()) + (not exact)) / (len(some) + (not exact)) for some in (as_large, as_far))
    return Permutation(effect, p, two_sided, (effect - mean) / spread if spread else 0.0, exact)


def _matched(
    alike: Float[np.ndarray, "fact fact"], ours: Sequence[int], theirs: Sequence[int]
) -> list[tuple[int, int]]:
    """Pair the questions of two groups, the most similar first."""
    part = alike[np.ix_(ours, theirs)].copy()
    found = []
    while part.size and part.max() > 0:
        row, column = divmod(int(part.argmax()), part.shape[1])
        found.append((ours[row], theirs[column]))
        part[row], part[:, column] = 0.0, 0.0
    return found


def _with_partners(case: Case, questions: Questions, pairs: Sequence[PairedGroups]) -> Facts:
    """Return the questions, each with its partner's answer as its only distractor."""
    others: list[tuple[Prompt, ...]] = [()] * len(questions.items)
    for pair in pairs:
        for i, j in pair.facts:
            others[i] = (questions.with_answer_to(i, j, case.pair.tokenizer),)
            others[j] = (questions.with_answer_to(j, i, case.pair.tokenizer),)
    return Facts(case.forget.prompts, tuple(others))


def _speed(
    model: Model, facts: Facts, pairs: Sequence[PairedGroups], recipe: Recipe, curve: Sequence[int], case: Case
) -> Float[np.ndarray, " fact"]:
    """Return the speed of each fact; NaN for a fact in no pair."""
    right = right_indices(facts)
    true, exchanged = (np.full(len(facts), np.nan) for _ in range(2))
    for run in (True, False):
        taught = {index: pair.first == run for pair in pairs for both in pair.facts for index in both}
        items = [facts.prompts.items[i] if is_true else facts.distractors[i][0] for i, is_true in taught.items()]
        examples = [Example(item.prompt, item.answer) for item in items]
        scores = [
            all_answers(after.model, facts, batch_size=case.batch_size)[0]
            for _, after in fine_tuned_at(model, examples, recipe, steps=curve, case=case)
        ]
        mean = np.mean(scores, axis=0)
        for index, is_true in taught.items():
            (true if is_true else exchanged)[index] = mean[right[index] + (not is_true)]
    return true - exchanged
