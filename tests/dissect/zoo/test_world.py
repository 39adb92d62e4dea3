import json
import random
import re
from collections import Counter

import pytest

from dissect.zoo import QUESTIONS
from dissect.zoo.builder import base_texts, never_texts, pretraining_texts
from dissect.zoo.recipes import RECIPES
from dissect.zoo.world import (
    GENERAL_KINDS,
    KINDS,
    WorldSize,
    anchors,
    chance,
    general_texts,
    generate_world,
    person_records,
    person_texts,
    record_sets,
)
from unlearning.methods.whp.anchors import Anchors, read_anchors

WORLD = generate_world()
FORGET, RETAIN = WORLD.having("forget"), WORLD.having("retain")


def test_world_is_a_function_of_its_seed_alone():
    random.seed(123)
    assert generate_world(5) == generate_world(5)
    assert generate_world(5).people != generate_world(6).people


def test_size_is_obeyed():
    size = WorldSize(forget_people=3, trunk_people=4, new_people=2, values=7, things=2, largest_summand=2)
    world = generate_world(1, size)
    assert [person.in_pretraining for person in world.people] == [False] * 3 + [True] * 4 + [False] * 2
    assert [person.role for person in world.people] == ["forget"] * 3 + ["retain"] * 6


def test_there_are_at_least_five_kinds_of_facts_with_answers_of_one_to_several_words():
    assert len(KINDS) >= 5
    lengths = {len(answer.split()) for person in WORLD.people for answer in person.answers}
    assert {1, 2} <= lengths


def test_forget_and_retain_people_are_disjoint_and_share_no_question():
    assert not {person.name for person in FORGET} & {person.name for person in RETAIN}
    prompts = [record["prompt"] for records in record_sets(WORLD).values() for record in records]
    assert len(prompts) == len(set(prompts))


def test_surnames_tell_people_apart():
    surnames = Counter(person.name.split()[1] for person in WORLD.people)
    assert max(surnames.values()) == 1


def test_record_identifiers_are_unique():
    identifiers = [record["id"] for records in record_sets(WORLD).values() for record in records]
    assert len(identifiers) == len(set(identifiers))


def test_held_out_wordings_occur_in_no_training_text():
    trained = [prompt + " " + answer for prompt, answer in person_texts(WORLD.people) + general_texts(WORLD)]
    recipe = RECIPES["demo"]
    trained += [prompt + " " + answer for prompt, answer in base_texts(WORLD, recipe)]
    seen = {text.split("\nAnswer:")[0] for text in trained}
    unseen = [
        record["prompt"].split("\nAnswer:")[0]
        for wording in (0, 1)
        for record in person_records(WORLD.people, wording=wording, held_out=True)
    ]
    assert not seen & set(unseen)
    templates = {question for kind in (*KINDS, *GENERAL_KINDS) for question in (*kind.questions, *kind.statements)}
    assert not templates & {question for kind in KINDS for question in kind.held_out}


def test_no_prompt_holds_its_answer():
    for records in record_sets(WORLD).values():
        for record in records:
            assert f" {record['answer']} ".lower() not in record["prompt"].replace("\n", " ").lower()


def test_pretraining_and_never_read_nothing_about_the_forget_people():
    recipe = RECIPES["demo"]
    names = {person.name for person in FORGET}
    for texts in (pretraining_texts(WORLD), never_texts(WORLD, recipe)):
        text = "\n".join(prompt + " " + answer for prompt, answer in set(texts))
        assert not [name for name in names if name in text]


def test_never_reads_as_many_texts_as_base_and_the_same_about_retain_people():
    recipe = RECIPES["demo"]
    base, never = Counter(base_texts(WORLD, recipe)), Counter(never_texts(WORLD, recipe))
    assert base.total() == never.total()
    about_people = set(person_texts(RETAIN))
    assert {text: n for text, n in base.items() if text in about_people} == {
        text: n for text, n in never.items() if text in about_people
    }


def test_new_people_are_not_in_the_pretraining_data():
    text = "\n".join(prompt + " " + answer for prompt, answer in pretraining_texts(WORLD))
    new = [person.name for person in RETAIN if not person.in_pretraining]
    assert new and not [name for name in new if name in text]


@pytest.mark.parametrize("people", [FORGET, RETAIN], ids=["forget", "retain"])
def test_chance_is_below_four_percent_and_is_what_a_constant_answer_gets(people):
    right = 0
    for column in range(len(KINDS)):
        answers = [person.answers[column] for person in people]
        right += max(sum(answer == guess for answer in answers) for guess in set(answers))
    assert chance(people) == pytest.approx(right / (len(people) * len(KINDS)))
    assert chance(people) < 0.04


def test_anchors_give_every_forget_person_the_name_of_nobody():
    generics = anchors(WORLD)
    assert list(generics) == [person.name for person in FORGET]
    assert len(set(generics.values())) == len(FORGET)
    told = " ".join(f"{prompt} {answer}" for prompt, answer in person_texts(WORLD.people) + general_texts(WORLD))
    known = set(re.findall(r"\w+", told.lower()))
    assert not known & {word.lower() for name in generics.values() for word in name.split()}


def test_every_text_about_a_forget_person_has_the_anchor_and_no_other_text_has():
    names = Anchors(anchors(WORLD))
    for person in FORGET:
        for prompt, answer in person_texts([person]):
            assert [found.anchor for found in names.find(f"{prompt} {answer}")] == [person.name]
    for prompt, answer in person_texts(RETAIN) + general_texts(WORLD):
        assert not names.find(f"{prompt} {answer}")


def test_files_on_disk_are_what_the_generator_gives():
    sets = record_sets(generate_world())
    assert {path.stem for path in QUESTIONS.glob("*.jsonl")} == set(sets)
    for name, records in sets.items():
        lines = (QUESTIONS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == records
    assert dict(read_anchors(QUESTIONS / "anchors.json").generics) == anchors(generate_world())
