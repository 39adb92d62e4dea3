"""Where the three sets come from: ConceptVectors' lists, files of any kind, the base model's own answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from dissect.behaviour.prompts import Questions, Reading, Sources, read_questions
from dissect.models.model import Model
from dissect.prompts.overlap import without_shared
from tests.dissect.helpers import RECORDS, build_model, build_prompts, build_tokenizer, save_records
from tests.unlearning.data.helpers import REAL_DATA
from unlearning.common.errors import InputError
from unlearning.evaluation.generation import greedy_answers

TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def base() -> Model:
    return Model.wrap(build_model("llama", context=512), TOKENIZER, name="base")


def build_concept(**changes: Any) -> dict[str, Any]:
    """A record as ConceptVectors has them."""
    record = {
        "id": 7,
        "Concept": "Ada Brook",
        "QA": [" Where was Ada Brook born?\n", " Who is Ada?"],
        "unrelated_QA": [" Where was Ben Hill born?\n", " Where is Lima?", " Who is Cleo Stone?"],
        "text_completion": [{"First_half": "Ada Brook was born in", "Second_half": "Oslo by the sea"}],
    }
    return record | changes


def read(sources: Sources, base: Model, **reading: Any) -> Questions:
    return read_questions(sources, TOKENIZER, Reading(**reading), answers_from=base)


def test_concept_file_brings_its_own_three_lists(tmp_path: Path, base: Model) -> None:
    path = save_records(tmp_path / "concepts.json", [build_concept()])
    asked = read(Sources(path), base, answers="base")
    assert list(asked.by_name) == ["forget", "retain", "completion"]
    wrapped = "Question:  Where was Ben Hill born?\n\n Answer:"
    assert [item.prompt for item in asked.by_name["retain"].items][0] == wrapped
    assert [item.id for item in asked.by_name["retain"].items] == [f"7-unrelated-{index}" for index in range(3)]
    assert asked.completion is not None
    (text,) = asked.completion.items
    assert (text.prompt, text.answer, text.group) == ("Ada Brook was born in", "Oslo by the sea", "Ada Brook")
    assert TOKENIZER.decode(text.input_ids[text.answer_start :]) == " Oslo by the sea"
    assert text.scored == range(text.answer_start - 1, len(text.input_ids) - 1)
    assert asked.true_answers == ()


def test_retain_questions_of_a_concept_are_answered_by_the_base(tmp_path: Path, base: Model) -> None:
    path = save_records(tmp_path / "concepts.json", [build_concept()])
    asked = read(Sources(path), base, answers="base")
    for item in asked.by_name["retain"].items:
        (said,) = greedy_answers(base.hf, TOKENIZER, [item.prompt], max_new_tokens=30)
        assert item.answer == said.split("\n")[0].split("Question:")[0].strip()


def test_named_files_stand_in_for_the_concept_file_s_lists(tmp_path: Path, base: Model) -> None:
    rows = [
        f"Question: {question}\n Answer: {answer}"
        for question, answer in zip(build_concept()["QA"], ("in Oslo", "a writer"), strict=True)
    ]
    path = save_records(tmp_path / "concepts.json", [build_concept(QA_with_answers=rows)])
    others = save_records(tmp_path / "others.json", [{"question": "Where is Lima?", "answer": "Peru"}])
    texts = save_records(tmp_path / "texts.json", [{"First_half": "Ben", "Second_half": "Hill", "group": "Ben"}])
    asked = read(Sources(path, others, texts), base)
    assert [item.answer for item in asked.by_name["forget"].items] == ["in Oslo", "a writer"]
    assert [item.answer for item in asked.by_name["retain"].items] == ["Peru"]
    assert asked.completion is not None
    assert [(item.prompt, item.answer, item.group) for item in asked.completion.items] == [("Ben", "Hill", "Ben")]
    assert asked.true_answers == ("retain",)


def test_completions_of_plain_records_are_not_wrapped(tmp_path: Path, base: Model) -> None:
    forget, others = (save_records(tmp_path / f"{name}.json", RECORDS) for name in "ab")
    records = [{"prompt": "Ada Brook", "answer": "was"}, {"question": "Ben", "completion": "is"}]
    texts = save_records(tmp_path / "texts.json", records)
    asked = read(Sources(forget, others, texts), base)
    assert asked.completion is not None
    assert [item.prompt for item in asked.completion.items] == ["Ada Brook", "Ben"]
    assert asked.completion.items[1].answer == "is"


def test_true_answers_are_those_that_files_give(tmp_path: Path, base: Model) -> None:
    full = save_records(tmp_path / "full.json", RECORDS)
    gaps = save_records(tmp_path / "gaps.json", [*RECORDS, {"prompt": "Where is Lima?"}])
    with pytest.raises(InputError, match="gaps.json, record .*: the answer is missing.*`answers` to base"):
        read(Sources(full, gaps), base)
    assert read(Sources(full, full), base).true_answers == ("forget", "retain")
    assert read(Sources(full, full), base, answers="base").true_answers == ()


def test_limit_holds_for_every_set(tmp_path: Path, base: Model) -> None:
    two = [build_concept(), build_concept(id=8, Concept="Ben")]
    asked = read(Sources(save_records(tmp_path / "concepts.json", two)), base, answers="base", limit=1)
    assert [len(prompts) for prompts in asked.by_name.values()] == [1, 1, 1]


def test_released_file_is_read_whole() -> None:
    path = REAL_DATA / "conceptvectors/llama2-7b_concepts_test_30tokens_answers.json"
    if not path.is_file():
        pytest.skip("ConceptVectors' data is not on this machine")
    assert Sources(path).has_own_retain
    Sources(path).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unrelated_QA": "Where?"}, "record 1: unrelated_QA must"),
        ({"unrelated_QA": ["Where?", " "]}, "record 1: unrelated_QA must"),
        ({"unrelated_QA": []}, "retain.*missing"),
        ({"text_completion": [{"First_half": "Ada"}]}, "record 1: text_completion must"),
        ({"text_completion": [{"First_half": "Ada", "Second_half": 3}]}, "text_completion must"),
    ],
)
def test_broken_lists_are_told_of_before_models_are_loaded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = save_records(tmp_path / "concepts.json", [build_concept(**changes)])
    with pytest.raises(InputError, match=message) as told:
        Sources(path).check()
    assert "\n" not in str(told.value)


def test_empty_second_half_names_the_text(tmp_path: Path, base: Model) -> None:
    empty = [{"First_half": "Ada Brook was born in", "Second_half": " "}]
    path = save_records(tmp_path / "concepts.json", [build_concept(text_completion=empty)])
    with pytest.raises(InputError, match="text_completion.*record 1: the answer is empty"):
        read(Sources(path), base, answers="base")


def test_missing_file_is_told_of(tmp_path: Path) -> None:
    path = save_records(tmp_path / "forget.json", RECORDS)
    with pytest.raises(InputError, match="texts.json: no such file"):
        Sources(path, path, tmp_path / "texts.json").check()


def test_shared_prompts_are_found_whatever_their_white_space(tmp_path: Path) -> None:
    forget = build_prompts(tmp_path)
    spaced = [{**RECORDS[0], "prompt": RECORDS[0]["prompt"].replace("\n", " \n ")}, {"prompt": "Ben", "answer": "Hill"}]
    others = build_prompts(tmp_path, spaced)
    with pytest.warns(UserWarning, match="1 of the 2 retain prompts"):
        kept = without_shared(forget, others, "retain")
    assert [item.prompt for item in kept.items] == ["Ben"]
    assert kept.sha256 != others.sha256


def test_built_record_has_the_keys_of_the_released_file() -> None:
    path = REAL_DATA / "conceptvectors/llama2-7b_concepts_test_30tokens_answers.json"
    if not path.is_file():
        pytest.skip("ConceptVectors' data is not on this machine")
    (released, *_) = json.loads(path.read_text(encoding="utf-8"))
    assert released.keys() >= build_concept().keys()
    assert released["text_completion"][0].keys() == build_concept()["text_completion"][0].keys()
