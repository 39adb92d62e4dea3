"""Alternate answers, and rows that forget and retain share."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import REAL_DATA, needs_real, write_json
from unlearning import Example, InputError
from unlearning.data.overlap import Overlap, overlap, refuse_overlap
from unlearning.data.sources import read_alternates, read_training_data

FORGET = [Example("Question: Who?\nAnswer:", "Ines"), Example("Question: Where?\nAnswer:", "Marrow Point")]


def test_alternates_are_matched_by_their_prompts(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "a.json",
        [
            {"question": "Where?", "answer": "At home"},
            {"question": "Who?", "answer": "Otto"},
            {"question": "When?", "answer": "Never asked"},
            {"prompt": "Question: Who?\nAnswer:", "answer": "Greta"},
        ],
    )
    assert read_alternates(path, FORGET) == [["Otto", "Greta"], ["At home"]]
    assert read_alternates(path, [Example("Who?", "Ines")], template="{question}") == [["Otto"]]


def test_alternates_beside_an_answer_are_the_alternates(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "a.json",
        [
            {"question": "Who?", "answer": "Ines", "perturbed_answer": ["Otto", "Greta"]},
            {"question": "Where?", "answer": "Marrow Point", "alternate": "At home"},
        ],
    )
    assert read_alternates(path, FORGET) == [["Otto", "Greta"], ["At home"]]


def test_missing_alternates_are_counted(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"question": "Who?", "answer": "Otto"}])
    with pytest.raises(InputError) as error:
        read_alternates(path, [*FORGET, Example("Why?", "So")])
    assert "2 of the 3 forget examples have no alternate answer (the first: 'Question: Where?" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_forget_answer_is_no_alternate_to_itself(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "a.json", [{"question": "Who?", "answer": " Ines"}, {"question": "Where?", "answer": "x"}]
    )
    with pytest.raises(InputError, match="1 of the 2 forget examples have their own answer as an alternate"):
        read_alternates(path, FORGET)


@needs_real
def test_tofus_perturbed_answers_are_alternates() -> None:
    forget = read_training_data("tofu:forget01", data_dir=REAL_DATA).examples
    alternates = read_alternates("tofu:forget01_perturbed", forget, data_dir=REAL_DATA)
    assert [len(answers) for answers in alternates] == [5] * 40
    assert alternates[0][0].startswith("Gregor Mendel")
    assert not any(example.answer in answers for example, answers in zip(forget, alternates, strict=True))


SMALL = st.lists(
    st.builds(Example, st.sampled_from(["", "Who?", "Who? ", "Where?"]), st.sampled_from(["a", "b", "a b"]))
)


@given(forget=SMALL, retain=SMALL)
@settings(max_examples=100)
def test_overlap_counts_pair_by_pair(forget: list[Example], retain: list[Example]) -> None:
    def plain(example: Example) -> tuple[str, str]:
        return example.prompt.strip(), example.answer.strip()

    found = overlap(forget, retain)
    assert found.rows == sum(any(plain(f) == plain(r) for r in retain) for f in forget)
    assert found.prompts == sum(f.prompt != "" and any(plain(f)[0] == plain(r)[0] for r in retain) for f in forget)
    assert found.forget == len(forget)


def test_an_overlap_is_refused_and_shared_prompts_are_said() -> None:
    with pytest.raises(InputError, match="overlap: 1 of the 2 forget rows .*the first: 'Question: Who"):
        refuse_overlap(FORGET, [Example("Question:  Who?\nAnswer:", "Ines\n"), Example("", "Ines")])
    notes = refuse_overlap(FORGET, [Example("Question: Who?\nAnswer:", "I don't know.")])
    assert notes == ("1 of the 2 forget prompts are in the retain data with another answer",)
    assert refuse_overlap(FORGET, [Example("", "Marrow Point")]) == ()
    assert overlap(FORGET, []) == Overlap(rows=0, prompts=0, forget=2)


@needs_real
def test_real_splits_do_not_overlap_and_the_full_set_does() -> None:
    forget, retain, full = (
        read_training_data(f"tofu:{split}", data_dir=REAL_DATA).examples for split in ("forget10", "retain90", "full")
    )
    assert overlap(forget, retain).rows == 0
    assert overlap(forget, full).rows == 400
