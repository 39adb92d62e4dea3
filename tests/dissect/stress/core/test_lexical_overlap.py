"""What can be told from the words alone, against counts by hand."""

import numpy as np
import pytest

from dissect.prompts.loading import load_prompts
from dissect.stress.core.distractors import Facts, with_distractors
from dissect.stress.core.lexical_overlap import lexical_overlap
from dissect.stress.core.scores import chance_accuracy
from tests.dissect.stress.constructed import model, questions


def asked(tmp_path, *records: str) -> Facts:
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(records))
    return with_distractors(load_prompts(path, model("demo:base").tokenizer))


def test_answers_are_ranked_by_the_share_of_their_words_that_the_question_has(tmp_path):
    """Mo: 2 of 3 words against 1 of 3, 2 of 3 and 0: rank (1 + 1/2 + 1) / 3, and chosen one time in two;
    Bo: 0 of 1 against 1 of 1: rank 0."""
    facts = asked(
        tmp_path,
        '{"question": "Was Mo born?", "answer": "Mo was tall", "wrong": ["Bo was tall", "Was mo small", "Kalo"]}',
        '{"question": "Where is Bo?", "answer": "Kalo", "wrong": ["Bo!"]}',
    )
    assert lexical_overlap(facts) == {
        "rank": pytest.approx((2.5 / 3 + 0) / 2),
        "accuracy": pytest.approx((1 / 2 + 0) / 2),
    }


def test_who_repeats_the_question_is_found_by_it(tmp_path):
    facts = asked(
        tmp_path,
        *(f'{{"question": "Where is {name}?", "answer": "{name} is in {name}ville"}}' for name in ("Mo", "Bo", "Ko")),
    )
    assert lexical_overlap(facts) == {"rank": 1.0, "accuracy": 1.0}


def test_the_built_in_world_gives_nothing_away():
    facts = with_distractors(questions("forget"))
    found = lexical_overlap(facts)
    assert found["rank"] == pytest.approx(0.5, abs=0.005)
    assert found["accuracy"] == pytest.approx(chance_accuracy(facts), abs=0.01)


def test_facts_without_wrong_answers_are_left_out(tmp_path):
    facts = asked(tmp_path, '{"prompt": "Mo is", "answer": "Mo", "wrong": ["old"]}', '{"prompt": "A", "answer": "b"}')
    bare = Facts(facts.prompts, (facts.distractors[0], ()))
    assert lexical_overlap(bare) == {"rank": 1.0, "accuracy": 1.0}
    assert all(np.isnan(value) for value in lexical_overlap(Facts(facts.prompts, ((), ()))).values())
