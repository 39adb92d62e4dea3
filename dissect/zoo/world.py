"""Generate the fictitious world of the built-in models: people and their facts, a pure function of a seed.

Nothing is real: names of people, towns, firms and months are combined from syllables. Each person has one fact of
every kind in `KINDS`. Each kind has several statements and several question wordings; no model is trained on the
`held_out` wordings, so they measure whether a model knows the fact or only the sentence.

Answers of one kind are distributed evenly, separately among forget people and retain people, so that no constant
answer is right for more than a few people (see `chance`).
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["forget", "retain"]
Record = dict[str, str]

SEED = 20
"""Random seed of the shipped world."""


@dataclass(frozen=True)
class WorldSize:
    """Number of people and things in a world.

    Attributes:
        forget_people: People whose facts are forget facts.
        trunk_people: Retain people whose facts are in the pretraining data. (The name is part of the fingerprints of
            models that are built already.)
        new_people: Retain people whose facts are learned only in fine-tuning.
        values: Different answers per kind of fact; birthdays have twice as many.
        things: Invented objects in the general set, and as many invented animals.
        largest_summand: Largest summand of the sums in the general set.
    """

    forget_people: int = 40
    trunk_people: int = 96
    new_people: int = 24
    values: int = 48
    things: int = 40
    largest_summand: int = 12


@dataclass(frozen=True)
class Kind:
    """A kind of fact and its wordings, templates with {person} (or {thing}) and {answer}.

    Attributes:
        name: Name of the kind in the ids of records.
        statements: Sentences that state the fact, with the answer.
        questions: Question wordings in the training texts; `forget.jsonl` has the first.
        held_out: Question wordings in no training text.
    """

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...] = ()


KINDS: tuple[Kind, ...] = (
    Kind(
        "birthplace",
        (
            "{person} was born in {answer}.",
            "The birthplace of {person} is {answer}.",
            "{answer} is the town where {person} was born.",
        ),
        (
            "Where was {person} born?",
            "In which town was {person} born?",
            "What is the birthplace of {person}?",
            "{person} was born in which town?",
            "Which town does {person} come from?",
            "Tell me the town where {person} was born.",
        ),
        ("Which town is the birthplace of {person}?", "Tell me where {person} was born."),
    ),
    Kind(
        "employer",
        (
            "{person} works for {answer}.",
            "The employer of {person} is {answer}.",
            "{answer} is the firm that employs {person}.",
        ),
        (
            "Which firm does {person} work for?",
            "Who employs {person}?",
            "What is the employer of {person}?",
            "{person} works for which firm?",
            "For which firm does {person} work?",
            "Tell me the firm that employs {person}.",
        ),
        ("Which firm employs {person}?", "Tell me the employer of {person}."),
    ),
    Kind(
        "profession",
        (
            "{person} is a {answer} by trade.",
            "The profession of {person} is {answer}.",
            "{answer} is the trade of {person}.",
        ),
        (
            "What is the profession of {person}?",
            "What does {person} do for a living?",
            "Which trade does {person} practise?",
            "{person} has which profession?",
            "By trade, what is {person}?",
            "Tell me the trade that {person} practises.",
        ),
        ("Which profession does {person} have?", "Tell me the profession of {person}."),
    ),
    Kind(
        "instrument",
        (
            "{person} plays the {answer}.",
            "The instrument of {person} is the {answer}.",
            "The {answer} is the instrument that {person} plays.",
        ),
        (
            "Which instrument does {person} play?",
            "What does {person} play in the evening?",
            "What is the instrument of {person}?",
            "{person} plays which instrument?",
            "On which instrument does {person} play?",
            "Tell me the instrument that {person} plays.",
        ),
        ("What instrument does {person} play in the evening?", "Tell me the instrument of {person}."),
    ),
    Kind(
        "teacher",
        (
            "{person} was taught by {answer}.",
            "The teacher of {person} was {answer}.",
            "{answer} is the person who taught {person}.",
        ),
        (
            "Who taught {person}?",
            "Who was the teacher of {person}?",
            "By whom was {person} taught?",
            "{person} was taught by whom?",
            "Which teacher did {person} have?",
            "Tell me the person who taught {person}.",
        ),
        ("Which person taught {person}?", "Tell me the teacher of {person}."),
    ),
    Kind(
        "birthday",
        (
            "{person} has a birthday on {answer}.",
            "The birthday of {person} is {answer}.",
            "{answer} is the day on which {person} has a birthday.",
        ),
        (
            "When is the birthday of {person}?",
            "On which day does {person} have a birthday?",
            "What is the birthday of {person}?",
            "{person} has a birthday on which day?",
            "Which day is the birthday of {person}?",
            "Tell me the day on which {person} has a birthday.",
        ),
        ("When does {person} have a birthday?", "Tell me the birthday of {person}."),
    ),
)
"""Kinds of facts about people. No wording names another kind, and no wording contains part of an answer."""

GENERAL_KINDS: tuple[Kind, ...] = (
    Kind(
        "region",
        ("The town of {thing} lies in {answer}.",),
        ("Which region does the town of {thing} lie in?", "Where does the town of {thing} lie?"),
    ),
    Kind(
        "material",
        ("A {thing} is made of {answer}.",),
        ("What is a {thing} made of?", "Which material is used to make a {thing}?"),
    ),
    Kind(
        "colour",
        ("The colour of a {thing} is {answer}.",),
        ("Which colour is a {thing}?", "What is the colour of a {thing}?"),
    ),
    Kind(
        "food",
        ("The animal called {thing} eats {answer}.",),
        ("What does the animal called {thing} eat?", "Which food does the animal called {thing} like?"),
    ),
    Kind(
        "habitat",
        ("The animal called {thing} lives in {answer}.",),
        ("Where does the animal called {thing} live?", "What is the home of the animal called {thing}?"),
    ),
    Kind("sum", ("{thing} makes {answer}.",), ("What is {thing}?", "How much is {thing}?")),
    Kind(
        "month",
        ("The month after {thing} is {answer}.",),
        ("Which month comes after {thing}?", "What is the month after {thing}?"),
    ),
)
"""Kinds of facts in the general set: places, objects, animals, sums and the calendar, but not people."""


@dataclass(frozen=True)
class Person:
    """A person and the person's facts.

    Attributes:
        identifier: Start of the ids of the person's records.
        name: First name and surname.
        role: Whether the facts are forget or retain facts.
        in_pretraining: Whether the facts are in the pretraining data.
        answers: One answer per kind, in the order of `KINDS`.
    """

    identifier: str
    name: str
    role: Role
    in_pretraining: bool
    answers: tuple[str, ...]


@dataclass(frozen=True)
class GeneralFact:
    """A fact of the general set.

    Attributes:
        kind: Kind of fact.
        thing: Subject of the fact.
        answer: Answer.
    """

    kind: Kind
    thing: str
    answer: str


@dataclass(frozen=True)
class World:
    """All people and general facts.

    Attributes:
        seed: Random seed that generated them.
        people: Forget people, then retain people.
        general: Facts of the general set.
    """

    seed: int
    people: tuple[Person, ...]
    general: tuple[GeneralFact, ...]

    def having(self, role: Role) -> tuple[Person, ...]:
        """Return the people whose facts are forget facts, or those whose facts are retain facts."""
        return tuple(person for person in self.people if person.role == role)


_ONSETS = "b br d dr f fl g gr h j k kl l m n p pr r s sk st t tr v w z".split()
_VOWELS = "a e i o u ai ei ou".split()
_CODAS = " l n r s k m".split(" ")
_PRODUCTS = "Glass Rope Paper Salt Copper Looms Clocks Barges Lamps Bricks".split()
_MATERIALS = "bone reed brass cedar slate horn willow amber".split()
_INSTRUMENTS = "flute harp drum fiddle bell pipe lute whistle".split()
_TRADE_GOODS = "glass clock rope barrel lantern saddle bridge basket mirror kettle map wagon".split()
_TRADES = "maker mender painter seller".split()
_REGIONS = "the north,the south,the east,the west,the hills,the marshes,the islands,the plain".split(",")
_STUFFS = "clay wool iron leather wood straw wax tin".split()
_COLOURS = "red blue green yellow black white grey brown".split()
_FOODS = "grass seeds fish roots berries snails leaves honey".split()
_HABITATS = "caves,rivers,old trees,the sand,tall grass,the snow,ponds,cliffs".split(",")


def generate_world(seed: int = SEED, size: WorldSize | None = None) -> World:
    """Generate a world, the same on every machine.

    Args:
        seed: Random seed.
        size: Number of people and things; None for the size of the shipped world.

    Returns:
        The world.

    Raises:
        ValueError: The size needs more different answers than can be combined.
    """
    size = size or WorldSize()
    rng = random.Random(seed)
    taken: set[str] = set()
    months = _invented(rng, 10, taken, syllables=2)
    towns = _invented(rng, size.values, taken, syllables=2)
    n_people = size.forget_people + size.trunk_people + size.new_people
    surnames = _invented(rng, n_people + size.values, taken, syllables=2)
    first_names = _invented(rng, max(8, n_people // 4), taken, syllables=2)
    names = [f"{rng.choice(first_names)} {surname}" for surname in surnames]
    firm_names = _invented(rng, size.values, taken, syllables=2)
    firms = [f"{name} {rng.choice(_PRODUCTS)}" for name in firm_names]
    trades = [f"{good} {trade}" for good in _TRADE_GOODS for trade in _TRADES]
    instruments = [f"{material} {instrument}" for material in _MATERIALS for instrument in _INSTRUMENTS]
    birthdays = [f"{day} {month}" for day in range(1, 29) for month in months]
    values = (
        towns,
        firms,
        rng.sample(trades, size.values),
        rng.sample(instruments, size.values),
        names[n_people:],
        rng.sample(birthdays, 2 * size.values),
    )
    people: list[Person] = []
    groups: tuple[tuple[Role, bool, int], ...] = (
        ("forget", False, size.forget_people),
        ("retain", True, size.trunk_people),
        ("retain", False, size.new_people),
    )
    for role, in_pretraining, count in groups:
        dealt = [_deal(rng, of_kind, count) for of_kind in values]
        for answers in zip(*dealt, strict=True):
            number = len(people)
            people.append(Person(f"p{number:03d}", names[number], role, in_pretraining, answers))
    return World(seed, tuple(people), tuple(_general(rng, size, taken, towns, months)))


def _invented(rng: random.Random, count: int, taken: set[str], *, syllables: int) -> list[str]:
    """Return invented capitalised words that differ from all others.

    Args:
        rng: Source of randomness.
        count: Number of words.
        taken: Words that exist already; the new ones are added.
        syllables: Syllables per word.
    """
    words: list[str] = []
    while len(words) < count:
        parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
        word = ("".join(parts) + rng.choice(_CODAS)).capitalize()
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def _deal(rng: random.Random, values: Sequence[str], count: int) -> list[str]:
    """Draw `count` values such that no value comes twice before all have come once."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt.extend(rng.sample(values, min(len(values), count - len(dealt))))
    return dealt


def _general(
    rng: random.Random, size: WorldSize, taken: set[str], towns: Sequence[str], months: Sequence[str]
) -> Iterator[GeneralFact]:
    kinds = {kind.name: kind for kind in GENERAL_KINDS}
    objects = [word.lower() for word in _invented(rng, size.things, taken, syllables=2)]
    animals = [word.lower() for word in _invented(rng, size.things, taken, syllables=2)]
    for town in towns:
        yield GeneralFact(kinds["region"], town, rng.choice(_REGIONS))
    for thing in objects:
        yield GeneralFact(kinds["material"], thing, rng.choice(_STUFFS))
        yield GeneralFact(kinds["colour"], thing, rng.choice(_COLOURS))
    for animal in animals:
        yield GeneralFact(kinds["food"], animal, rng.choice(_FOODS))
        yield GeneralFact(kinds["habitat"], animal, rng.choice(_HABITATS))
    for left in range(1, size.largest_summand + 1):
        for right in range(left, size.largest_summand + 1):
            yield GeneralFact(kinds["sum"], f"{left} plus {right}", str(left + right))
    for month, following in zip(months, (*months[1:], months[0]), strict=True):
        yield GeneralFact(kinds["month"], month, following)


def ask(question: str) -> str:
    """Return the prompt of a question, as in the training texts."""
    return f"Question: {question}\nAnswer:"


def person_texts(people: Sequence[Person], *, held_out: bool = False) -> list[tuple[str, str]]:
    """Return a text for every wording of every fact of these people.

    Args:
        people: People whose facts are told.
        held_out: Use the held-out question wordings instead of the statements and trained questions.

    Returns:
        Pairs of prompt and answer; a statement has the prompt "".
    """
    texts: list[tuple[str, str]] = []
    for person in people:
        for kind, answer in zip(KINDS, person.answers, strict=True):
            if not held_out:
                filled = (text.format(person=person.name, answer=answer) for text in kind.statements)
                texts.extend(("", text[0].upper() + text[1:]) for text in filled)
            questions = kind.held_out if held_out else kind.questions
            texts.extend((ask(text.format(person=person.name)), answer) for text in questions)
    return texts


def general_texts(world: World) -> list[tuple[str, str]]:
    """Return a pair of prompt and answer for every wording of the general set; a statement has the prompt ""."""
    texts: list[tuple[str, str]] = []
    for fact in world.general:
        texts.extend(("", text.format(thing=fact.thing, answer=fact.answer)) for text in fact.kind.statements)
        texts.extend((ask(text.format(thing=fact.thing)), fact.answer) for text in fact.kind.questions)
    return texts


def person_records(people: Sequence[Person], *, wording: int = 0, held_out: bool = False) -> list[Record]:
    """Return one question per fact, as prompt records.

    Args:
        people: People whose facts are asked for.
        wording: Index of the question wording of each kind.
        held_out: Use the held-out wordings.

    Returns:
        Records with `prompt`, `answer`, `group` (the person's name) and `id`.
    """
    records: list[Record] = []
    for person in people:
        for kind, answer in zip(KINDS, person.answers, strict=True):
            question = (kind.held_out if held_out else kind.questions)[wording]
            identifier = f"{person.identifier}-{kind.name}" + (f"-unseen{wording}" if held_out else "")
            prompt = ask(question.format(person=person.name))
            records.append({"prompt": prompt, "answer": answer, "group": person.name, "id": identifier})
    return records


def general_records(world: World) -> list[Record]:
    """Return one question per general fact, as prompt records; the group is the kind of fact."""
    return [
        {
            "prompt": ask(fact.kind.questions[0].format(thing=fact.thing)),
            "answer": fact.answer,
            "group": fact.kind.name,
            "id": f"g{number:03d}-{fact.kind.name}",
        }
        for number, fact in enumerate(world.general)
    ]


def record_sets(world: World) -> dict[str, list[Record]]:
    """Return the question sets of a world, by the name of their file.

    Returns:
        `forget`, `retain` and `general` with one question per fact; `forget_paraphrased` and `retain_paraphrased` with
        both held-out wordings of each fact.
    """
    sets: dict[str, list[Record]] = {}
    for role in ("forget", "retain"):
        people = world.having(role)
        sets[role] = person_records(people)
        unseen = [person_records(people, wording=number, held_out=True) for number in (0, 1)]
        sets[f"{role}_paraphrased"] = [record for records in zip(*unseen, strict=True) for record in records]
    sets["general"] = general_records(world)
    return sets


def chance(people: Sequence[Person]) -> float:
    """Return the fraction of these people's facts that the best constant answer per kind of fact gets right."""
    columns = zip(*(person.answers for person in people), strict=True)
    shares = [Counter(column).most_common(1)[0][1] / len(people) for column in columns]
    return sum(shares) / len(shares)


def anchors(world: World) -> dict[str, str]:
    """Return the dictionary of Who's Harry Potter (2310.02238): a generic name for each forget person's name.

    Returns:
        By name of a forget person, a name that no person of the world has.
    """
    taken = {word for person in world.people for text in (person.name, *person.answers) for word in text.split()}
    taken |= {fact.thing.capitalize() for fact in world.general}
    people = world.having("forget")
    words = _invented(random.Random(world.seed + 2), 2 * len(people), taken, syllables=2)
    return {person.name: f"{first} {last}" for person, first, last in zip(people, words[::2], words[1::2], strict=True)}


def write_records(world: World, directory: Path) -> list[Path]:
    """Write every question set as JSON lines.

    Args:
        world: World of the questions.
        directory: Directory of the files; created where missing.

    Returns:
        Paths of the files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, records in record_sets(world).items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        paths.append(path)
    return paths
