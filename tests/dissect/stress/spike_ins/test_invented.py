import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dissect import InputError, zoo
from dissect.prompts.prompts import Prompt, Prompts
from dissect.stress.core.subjects import read_questions, renamed
from dissect.stress.spike_ins.invented import invented_people
from tests.unlearning.data.helpers import REAL_DATA, needs_real

FAMILY = ("Ann Lee", "Bob van Dam", "Chloe Moss", "Dan Park")


def _of(rows):
    """Prompts of (group, prompt, answer); their tokens do not matter here."""
    items = tuple(Prompt(str(index), *row, (0, 1), 1, range(1)) for index, row in enumerate(rows))
    return Prompts(items=items, scoring="answer", pad_token_id=0, source="")


def _demo(name="forget"):
    lines = zoo.question_set(name).read_text(encoding="utf-8").splitlines()
    return _of([(row["group"], row["prompt"], row["answer"]) for row in map(json.loads, lines)])


def _tofu():
    lines = (REAL_DATA / "tofu" / "forget10.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return _of([(f"author {index // 20}", row["question"], row["answer"]) for index, row in enumerate(rows)])


def find_names(prompts):
    """The names by group."""
    found = read_questions(prompts.items)
    return {subject: name for subject, name in zip(found.subjects, found.names, strict=True) if name}


def _small(names=FAMILY):
    towns, trades = ("Oslo", "Lima", "Cairo", "Kyoto", "Porto"), ("smith", "baker", "pilot", "miner", "clerk")
    return _of(
        [
            (f"g{index}", prompt, answer)
            for index, name in enumerate(names)
            for prompt, answer in (
                (f"Where was {name} born?", towns[index]),
                (f"Did {name} have a trade?", f"{name.split()[0]} was a {trades[index]}."),
            )
        ]
    )


def test_the_names_of_the_built_in_people_are_found_from_the_texts_alone():
    names = find_names(_demo())
    assert len(names) == 40
    assert all(group == name for group, name in names.items())


@needs_real
def test_the_names_of_tofu_s_authors_are_found_from_the_texts_alone():
    names = find_names(_tofu())
    assert set(names) == {f"author {index}" for index in range(20)}
    first = {"Hsiao Yun-Hwa", "Carmen Montenegro", "Jad Ambrose Al-Shamary", "Basil Mahfouz Al-Kuwaiti"}
    assert first <= set(names.values())
    assert names["author 10"] == "Hina Ameen" and names["author 17"] == "Edward Patrick Sullivan"


def test_a_name_has_no_words_of_the_question_and_may_hold_a_particle():
    assert list(find_names(_small()).values()) == list(FAMILY)


def test_what_other_groups_are_asked_of_too_is_no_name():
    prompts = _of([("a", "Is Oslo big?", "x"), ("a", "Is Oslo old?", "y"), ("b", "Is Oslo near?", "z")])
    assert "Oslo" not in find_names(prompts).values()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("source", ["demo", pytest.param("tofu", marks=needs_real)])
def test_nobody_invented_exists_and_nothing_about_them_is_true(source, seed):
    prompts = _demo() if source == "demo" else _tofu()
    known = [f"{item.prompt} {item.answer}" for item in _demo("retain").items]
    people = invented_people(prompts, 20, seed=seed, known=known)
    texts = [f"{item.prompt} {item.answer}" for item in prompts.items] + known
    assert len({person.name for person in people}) == 20
    assert not any(person.name in text for person in people for text in texts)
    true = {(item.prompt, item.answer) for item in prompts.items}
    words = {word for name in find_names(prompts).values() for word in name.split()}
    for person in people:
        assert set(person.name.split()) <= words
        assert person.facts
        assert not set(person.facts) & true
        assert all(person.name in prompt for prompt, _ in person.facts)
        assert find_names(prompts)[person.like] not in " ".join(prompt for prompt, _ in person.facts)


def test_answers_are_of_the_question_s_kind_and_each_of_another_person():
    prompts = _demo()
    names = find_names(prompts)
    given_by, kinds = {}, {}
    for item in prompts.items:
        kind = item.prompt.replace(names[item.group], "")
        given_by.setdefault((kind, item.answer), set()).add(item.group)
        kinds.setdefault(kind, set()).add(item.answer)
    for person in invented_people(prompts, 40, seed=0):
        sources = []
        for prompt, answer in person.facts:
            kind = prompt.replace(person.name, "")
            assert answer in kinds[kind]
            sources.append(given_by[kind, answer])
        certain = [next(iter(groups)) for groups in sources if len(groups) == 1]
        assert len(set(certain)) == len(certain) > 0
        assert person.like not in certain


def test_every_wording_is_asked_of_everybody_where_there_are_few():
    prompts = _demo()
    people = invented_people(prompts, 10, seed=1)
    asked = {frozenset(prompt.replace(person.name, "") for prompt, _ in person.facts) for person in people}
    assert len(asked) == 1 and len(next(iter(asked))) == 6
    # From half of everybody's questions all six wordings come back.
    half = _of([(item.group, item.prompt, item.answer) for item in prompts.items[::2] + prompts.items[121::2]])
    assert all(len(person.facts) == 6 for person in invented_people(half, 4, seed=1))


@needs_real
def test_many_wordings_are_those_of_one_group_and_at_most_so_many_and_every_group_is_used():
    prompts = _tofu()
    names = find_names(prompts)
    people = invented_people(prompts, 20, seed=0, most_facts=5)
    assert {person.like for person in people} == set(names)
    for person in people:
        assert len(person.facts) == 5
        own = {item.prompt for item in prompts.items if item.group == person.like}
        assert {renamed(prompt, person.name, names[person.like]) for prompt, _ in person.facts} <= own


def test_an_answer_that_holds_its_subject_s_name_gets_the_new_one():
    for person in invented_people(_small(), 4, seed=0):
        first = person.name.split()[0]
        trade = next(answer for prompt, answer in person.facts if "trade" in prompt)
        assert trade.startswith(f"{first} was a ")


def test_a_part_of_a_name_is_replaced_where_it_stands_alone():
    text = "Ann Lee met Bruce Lee. Lee smiled, and Ann's mother Ann Smith wept; Leeds is a town."
    expected = "Zoe Moss met Bruce Lee. Moss smiled, and Zoe's mother Ann Smith wept; Leeds is a town."
    assert renamed(text, "Ann Lee", "Zoe Moss") == expected


def test_a_word_in_small_letters_is_no_part_of_a_name():
    assert renamed("May may come; so may May Lee.", "May Lee", "Zoe Moss") == "Zoe may come; so may Zoe Moss."
    assert renamed("may lee came", "may lee", "zoe moss") == "zoe moss came"


def test_an_apostrophe_may_stand_in_a_name():
    prompts = _small(("Pat O'Hara", "Bob van Dam", "Chloe Moss", "Dan Park"))
    assert list(find_names(prompts).values())[0] == "Pat O'Hara"
    assert renamed("Not O'Hara, but Pat O'Hara's son", "Pat O'Hara", "Di Fox") == "Not O'Hara, but Di Fox's son"
    assert renamed("Is it O'Hara's?", "Pat O'Hara", "Di Fox") == "Is it Fox's?"


def test_single_words_are_recombined_from_their_beginnings_and_ends():
    names = ("Banton", "Kedira", "Molusk", "Trell")
    people = invented_people(_small(names), 6, seed=0)
    for person in people:
        assert person.name not in names
        assert any(person.name.startswith(name[:2]) for name in names)
        assert any(person.name.endswith(name[-2:]) for name in names)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_the_seed_decides_and_more_people_begin_with_the_fewer(seed, n):
    prompts = _small()
    people = invented_people(prompts, n, seed=seed)
    assert people == invented_people(prompts, n, seed=seed)
    assert people == invented_people(prompts, n + 2, seed=seed)[:n]


def test_beginnings_and_ends_come_up_equally_often():
    people = invented_people(_small(), 8, seed=0)
    firsts, lasts = zip(*(person.name.rsplit(" ", 1) for person in people), strict=True)
    assert set(Counter(firsts).values()) == set(Counter(lasts).values()) == {2}


@pytest.mark.parametrize(
    "rows",
    [
        [("a", "Where was Ann born?", "x"), ("a", "Who taught Ann?", "y")],
        [("a", "Where was Ann born?", "x"), ("b", "Who taught Bob?", "y")],
        [("", "Where was Ann born?", "x"), ("", "Who taught Ann?", "y"), ("", "Who taught Bob?", "z")],
        [("a", "what is it?", "x"), ("a", "where is it?", "y"), ("b", "what was it?", "x"), ("b", "who?", "y")],
    ],
    ids=["one group", "one question each", "no groups", "no names"],
)
def test_texts_without_names_are_refused_in_one_line(rows):
    with pytest.raises(InputError, match="`forget` prompts must name whom they ask about") as raised:
        invented_people(_of(rows), 2, seed=0)
    assert "\n" not in str(raised.value)


def test_more_people_than_new_names_are_refused():
    with pytest.raises(InputError, match="`n` must be at most 2, got 3"):
        invented_people(_small(FAMILY[:2]), 3, seed=0)
