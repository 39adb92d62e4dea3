"""How alike taught texts and questions are."""

import math

import pytest

from dissect.stress.core.likeness import likeness, own_words
from tests.dissect.stress.constructed import questions


def test_the_nearest_text_counts_for_every_question():
    taught = ["Where was Ada born?", "What does Ben do?"]
    assert likeness(["Where was Cleo born?"], taught) == 3 / 5
    assert likeness(["Where was Cleo born?", "Xyz"], taught) == pytest.approx(0.3)
    assert likeness(["where WAS cleo born"], taught, without=frozenset({"ada", "ben", "cleo"})) == 1
    assert likeness(["Where?"], []) == 0
    with pytest.warns(RuntimeWarning):
        assert math.isnan(likeness([], taught))


def test_words_of_one_group_are_its_own():
    texts = ["Where was Ada born?", "What does Ada do?", "Where was Ben born?", "What does Ben do?"]
    assert own_words(texts, ["1", "1", "2", "2"]) == {"ada", "ben"}
    assert own_words(texts, ["1"] * 4) == set()
    assert own_words(texts[::2], ["", ""]) == {"ada", "ben"}


def test_questions_of_one_form_are_alike_and_other_wordings_are_not():
    forget, other = questions("forget"), questions("forget_paraphrased")
    prompts = {name: [item.prompt for item in of.items] for name, of in (("same", forget), ("other", other))}
    groups = [item.group for item in (*forget.items, *other.items)]
    names = own_words(prompts["same"] + prompts["other"], groups)
    same, reworded = (likeness(prompts["same"], prompts[name], without=names) for name in ("same", "other"))
    assert same == 1 and reworded < 0.8
