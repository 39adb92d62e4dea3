"""Invent people of the same form as those of a data set, from the texts alone.

An invented person has a new name, the questions that the data ask about one of its people, and answers that the data
give about others. Nothing about an invented person is true, and every word is one that the data use. A model can only
know these facts if somebody teaches them, so that they tell what an attack finds where there is nothing, and where
there is something (`dissect.stress.spike_ins`).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dissect.prompts.prompts import Prompts
from dissect.stress.core.distractors import jaccard
from dissect.stress.core.subjects import read_questions, renamed
from unlearning.common.errors import InputError, check_at_least

MOST_FACTS = 8
"""Default maximum number of facts per invented person."""

SIMILAR = 0.75
"""An answer is taken from a group whose most similar question is at least this share as similar as the best group's."""

_SYLLABLE = re.compile(r"[^aeiouy]*[aeiouy]+(?:[^aeiouy]+$)?", re.IGNORECASE)


@dataclass(frozen=True)
class InventedPerson:
    """A person whom nobody knows.

    Attributes:
        name: The name; no text of the data contains it.
        like: The group whose questions are asked about the person.
        facts: Prompts and answers.
    """

    name: str
    like: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Question:
    """A question of the data that contains the name of its subject, and its wording without the name."""

    subject: str
    prompt: str
    answer: str
    wording: tuple[str, ...]

    @property
    def words(self) -> frozenset[str]:
        """The words of the wording."""
        return frozenset(self.wording) - {""}


@dataclass(frozen=True)
class _Group:
    """A group of the data whose subject's name is known."""

    group: str
    name: str
    questions: tuple[_Question, ...]


def invented_people(
    prompts: Prompts, n: int, *, seed: int, most_facts: int = MOST_FACTS, known: Iterable[str] = ()
) -> list[InventedPerson]:
    """Invent people of the same form as the groups of the prompts.

    The name of a group's subject is found by `dissect.stress.core.subjects`. A new name joins the first names of one
    group with the last name of another, or the beginning of one with the end of another where names are single words.
    The questions are those of a group, in a random order of the groups, with the new name in place of the old; or every
    question that is asked of anybody, if these have at most `most_facts` wordings. Each answer is an answer to a
    similar question of another group, and no two answers of a person come from one group as long as there are enough
    groups. Where an answer contains its own subject's name, the new name replaces it.

    Args:
        prompts: Questions with answers; `group` tells whom a question is about.
        n: Number of people to invent.
        seed: Random seed.
        most_facts: Maximum number of facts per person; of more questions, some are drawn.
        known: Further texts, such as the retain prompts, in which no new name may occur.

    Returns:
        The invented people.

    Raises:
        InputError: `n` or `most_facts` is below 1, no names can be found, or the names give fewer than `n` new ones.

    Examples:
        >>> from dissect import load_prompts
        >>> from dissect.models.model import load_model
        >>> from dissect.zoo import question_set
        >>> prompts = load_prompts(question_set("forget"), load_model("demo:base").tokenizer)
        >>> person = invented_people(prompts, 1, seed=0)[0]
        >>> len(person.facts), all(person.name in prompt for prompt, _ in person.facts)
        (6, True)
    """
    check_at_least("n", n, 1)
    check_at_least("most_facts", most_facts, 1)
    groups = _named_groups(prompts)
    rng = np.random.default_rng(seed)
    true = {(item.prompt, item.answer) for item in prompts.items}
    texts = "\n".join([*(f"{item.prompt}\n{item.answer}" for item in prompts.items), *known])
    names = {joined: _new_names(groups, joined, texts, rng) for joined in (True, False)}
    wordings = {question.wording: question for group in groups for question in group.questions}
    people: list[InventedPerson] = []
    for turn in _endless(len(groups), rng):
        if len(people) == n:
            break
        like = groups[turn]
        name = next(names[" " in like.name], None) or next(names[" " not in like.name], None)
        if name is None:
            raise InputError(
                f"`n` must be at most {len(people)}, got {n}: the names of the {len(groups)} groups of forget prompts "
                "give no more new names. Ask for fewer invented people or give prompts of more groups"
            )
        asked = list(wordings.values()) if len(wordings) <= most_facts else _some(like.questions, most_facts, rng)
        facts = _facts(asked, name, [group for group in groups if group.group != like.group], rng)
        assert not true & set(facts)
        people.append(InventedPerson(name, like.group, facts))
    return people


def _named_groups(prompts: Prompts) -> list[_Group]:
    """Return the groups with a name; at least two.

    Raises:
        InputError: There are fewer.
    """
    read = read_questions(prompts.items)
    questions: dict[str, list[_Question]] = defaultdict(list)
    for item, name, wording in zip(prompts.items, read.names, read.templates, strict=True):
        if item.group and name and name in item.prompt and not name[0].islower():
            questions[item.group].append(_Question(name, item.prompt, item.answer, wording))
    if len(questions) < 2:
        raise InputError(
            "the `forget` prompts must name whom they ask about to invent people like them: at least two groups, each "
            "with a name (capitalised words) in its questions that other groups' questions lack. Give prompts with "
            "such a `group` each, or leave out spike-ins"
        )
    return [_Group(group, some[0].subject, tuple(some)) for group, some in questions.items()]


def _new_names(groups: Sequence[_Group], joined: bool, texts: str, rng: np.random.Generator) -> Iterator[str]:
    """Return an iterator over new names, in which beginnings and ends of the known names come up equally often.

    Args:
        groups: The groups with their names.
        joined: Whether to recombine names of several words; else names of one word.
        texts: Texts in which no new name may occur.
        rng: Generator of the order.
    """
    split = _words_apart if joined else _syllables_apart
    parts = [split(group.name) for group in groups if (" " in group.name) == joined]
    order = rng.permutation(len(parts))
    space, seen = " " if joined else "", set()
    candidates = []
    for shift in range(1, len(parts)):
        for position, index in enumerate(order):
            start, end = parts[index][0], parts[order[(position + shift) % len(parts)]][1]
            name = f"{start}{space}{end}"
            if name not in seen and name not in texts and start and end:
                seen.add(name)
                candidates.append(name)
    return iter(candidates)


def _words_apart(name: str) -> tuple[str, str]:
    start, _, end = name.rpartition(" ")
    return start, end


def _syllables_apart(name: str) -> tuple[str, str]:
    """Cut a word in its middle: between two syllables, or before the vowel of its only one."""
    syllables = _SYLLABLE.findall(name)
    if len(syllables) > 1:
        cut = len("".join(syllables[: len(syllables) // 2]))
    else:
        vowel = re.search("[aeiouy]", name[1:], re.IGNORECASE)
        cut = vowel.start() + 1 if vowel else len(name) // 2
    return name[:cut], name[cut:]


def _endless(n: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield the numbers below `n` in a random order, again and again in new orders."""
    while True:
        yield from rng.permutation(n).tolist()


def _some(questions: Sequence[_Question], most: int, rng: np.random.Generator) -> list[_Question]:
    """Draw at most so many of the questions; they stay in their order."""
    chosen = rng.permutation(len(questions))[:most]
    return [questions[index] for index in sorted(chosen)]


def _facts(
    asked: Sequence[_Question], name: str, others: Sequence[_Group], rng: np.random.Generator
) -> tuple[tuple[str, str], ...]:
    """Return a person's questions and answers.

    Args:
        asked: The questions to ask.
        name: The person's name.
        others: The groups that may give answers.
        rng: Generator of the choice among groups.
    """
    used: Counter[str] = Counter()
    facts = []
    for question in asked:
        # Taken from the groups that have given the fewest answers so far, so that as few as possible give two.
        fewest = min(used[group.group] for group in others)
        nearest = []
        for group in others:
            if used[group.group] == fewest:
                similar = [jaccard(question.words, other.words) for other in group.questions]
                best = int(np.argmax(similar))
                nearest.append((similar[best], group.questions[best], group.group))
        enough = SIMILAR * max(similarity for similarity, _, _ in nearest)
        fitting = [(source, group) for similarity, source, group in nearest if similarity >= enough]
        source, of_group = fitting[int(rng.integers(len(fitting)))]
        used[of_group] += 1
        facts.append((renamed(question.prompt, question.subject, name), renamed(source.answer, source.subject, name)))
    return tuple(facts)
