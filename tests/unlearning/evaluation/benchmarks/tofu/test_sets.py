"""TOFU's sets from files: what is read, how rows are grouped, what is refused."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.analyses.helpers import needs_tofu
from tests.unlearning.evaluation.benchmarks.tofu.tofu_helpers import SETS, build_records, write_lines, write_tofu
from unlearning import InputError
from unlearning.data import hub, tofu
from unlearning.data.sources import read_training_data
from unlearning.evaluation.benchmarks.tofu.sets import QuestionSet, read_questions, read_sets

RECORD: dict[str, Any] = SETS["forget01_perturbed"][0]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_download(repository: str, _patterns: object) -> Path:
        raise InputError(f"{repository}: the hub cannot be reached")

    monkeypatch.setattr(hub, "download", no_download)


def refusal(*changed: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        read_questions([RECORD, *({**RECORD, **change} for change in changed)], source="rows.json")
    assert "\n" not in str(error.value)
    return str(error.value)


def set_refusal(forget: str | Path, data: Path, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read_sets(forget, data_dir=data, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def by_name(sets: list[QuestionSet]) -> dict[str, QuestionSet]:
    return {each.name: each for each in sets}


def test_a_row_is_taken_as_it_is() -> None:
    (question,) = read_questions([{**RECORD, "id": "a-1", "group": "a"}], source="rows.json")
    assert question.question == RECORD["question"] and question.paraphrased_question == RECORD["paraphrased_question"]
    assert question.answer == RECORD["answer"] and question.paraphrased_answer == RECORD["paraphrased_answer"]
    assert question.perturbed_answers == tuple(RECORD["perturbed_answer"])
    assert (question.id, question.group) == ("a-1", "a")


def test_twenty_rows_in_succession_are_one_authors_in_tofus_own_files_only(tmp_path: Path) -> None:
    many = [{**RECORD, "question": f"What is fact {number}?"} for number in range(41)]
    data = write_tofu(tmp_path, forget10_perturbed=many)
    groups = [question.group for question in by_name(read_sets("forget10", data_dir=data))["forget"].questions]
    assert groups == ["author-000"] * 20 + ["author-001"] * 20 + ["author-002"]
    sets = by_name(read_sets(data / "tofu" / "forget10_perturbed.json", data_dir=data))
    assert {question.group for question in sets["forget"].questions} == {""}
    assert {question.group for question in sets["world_facts"].questions} == {""}
    own = write_lines(tmp_path / "own.jsonl", [{**record, "author": "Ines"} for record in many])
    sets = by_name(read_sets(own, data_dir=data, limit=3))
    assert [question.group for question in sets["forget"].questions] == ["Ines"] * 3
    assert len(sets["retain"].questions) == len(sets["real_authors"].questions) == 3


def test_one_perturbed_answer_may_be_a_text() -> None:
    (question,) = read_questions([{**RECORD, "perturbed_answer": "Lima, in fact"}], source="rows.json")
    assert question.perturbed_answers == ("Lima, in fact",)


def test_a_set_may_have_no_paraphrases_and_no_perturbed_answers() -> None:
    (question,) = read_questions([{"question": "Who?", "answer": "Ines"}], source="rows.json")
    assert question.paraphrased_question is question.paraphrased_answer is None
    assert question.perturbed_answers == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perturbed_answer": None}, "no perturbed_answer, which other records have; add it, or leave the record out"),
        ({"paraphrased_answer": None}, "no paraphrased_answer, which other records have"),
        ({"paraphrased_question": None}, "no paraphrased_question, which other records have"),
        ({"perturbed_answer": []}, "perturbed_answer is an empty list; give wrong answers, or leave the record out"),
        ({"perturbed_answer": ["Lima", " "]}, "perturbed_answer should be texts that are not empty"),
        ({"perturbed_answer": [3]}, "perturbed_answer should be texts that are not empty"),
        ({"paraphrased_answer": ["Lima"]}, "paraphrased_answer should be a text that is not empty"),
        ({"question": ""}, "question should be a text that is not empty"),
        ({"answer": None}, "no answer; its keys are "),
        ({"answer": "Lima", "perturbed_answer": ["Oslo", " Lima\n"]}, "the answer is also among the perturbed ones"),
        ({"id": ["a"]}, '"id" must be text or a number, got list'),
        ({"group": math.nan}, '"group" must be text or a finite number'),
        ({"author": {"a": "b"}}, '"author" must be text or a number, got dict'),
    ],
)
def test_a_row_of_another_shape_is_named(change: dict[str, Any], message: str) -> None:
    said = refusal({}, change)
    assert said.startswith("rows.json, record 3: ") and message in said


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    data = write_tofu(tmp_path)
    assert "tofu:forget1: no such split; did you mean 'forget10'?" in set_refusal("forget1", data)
    assert set_refusal(tmp_path / "no.jsonl", data) == f"{tmp_path / 'no.jsonl'}: no such file"
    (tmp_path / "empty.jsonl").write_text("")
    assert "the file is empty" in set_refusal(tmp_path / "empty.jsonl", data)
    assert "`limit` must be at least 1, got 0" in set_refusal("forget01", data, limit=0)
    assert "the hub cannot be reached" in set_refusal("forget05", data)
    (data / "tofu" / "retain_perturbed.json").unlink()
    assert "tofu:retain_perturbed" in set_refusal("forget01", data)


def test_questions_that_are_to_be_forgotten_and_kept_are_refused(tmp_path: Path) -> None:
    data = write_tofu(tmp_path)
    said = set_refusal(data / "tofu" / "retain_perturbed.json", data)
    assert said.startswith("6 questions of retain_perturbed are in retain_perturbed.json, too")
    others = write_lines(tmp_path / "others.jsonl", build_records([16, 17]))
    sets = by_name(read_sets(data / "tofu" / "retain_perturbed.json", retain=others, data_dir=data))
    assert sets["retain"].label == "others.jsonl" and len(sets["retain"].questions) == 2


def test_larger_splits_are_cut_from_full_by_authors(tmp_path: Path) -> None:
    full = [{"question": f"What is fact {number}?", "answer": f"Fact {number}."} for number in range(10 * 20)]
    write_lines(tmp_path / "tofu" / "full.json", full)
    forget, retain = tofu.read("forget20", tmp_path), tofu.read("retain80", tmp_path)
    assert forget.records == full[160:] and retain.records == full[:160]
    assert forget.notes == ("forget20 is the last 40 rows of full",)
    assert read_training_data("tofu:forget90", data_dir=tmp_path).examples[0].answer == "Fact 20."
    with pytest.raises(InputError, match="tofu:forget25: 25 % of the 200 rows"):
        tofu.read("forget25", tmp_path)
    with pytest.raises(InputError, match="no such split"):
        tofu.read("forget00", tmp_path)
    data = write_tofu(tmp_path)
    sets = by_name(read_sets("forget20", data_dir=data))
    assert len(sets["forget"].questions) == 40
    assert {question.group for question in sets["forget"].questions} == {"author-000", "author-001"}


@needs_tofu
def test_the_real_splits_are_the_last_and_the_first_authors_of_full() -> None:
    data = Path(os.environ["DISSECT_DATA"])
    for share in (1, 5, 10):
        for kind, percent in (("forget", share), ("retain", 100 - share)):
            cut = tofu._cut(kind, percent, data).records
            assert cut == tofu.read(f"{kind}{percent:02d}", data).records
    # No forget split up to forget90 holds TOFU's retain questions.
    sets = by_name(read_sets("forget90", data_dir=data))
    assert len(sets["forget"].questions) == 3600 and len(sets["retain"].questions) == 400


def test_some_of_the_sets_need_no_files_of_the_others(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("forget", "retain")}
    for name, file in files.items():
        file.write_text(json.dumps({"question": f"Who is {name}?", "answer": "Ada.", "group": name}) + "\n")
    found = read_sets(files["forget"], retain=files["retain"], names=["retain"], data_dir=tmp_path)
    assert [each.name for each in found] == ["forget", "retain"]
    assert [each.name for each in read_sets(files["forget"], names=["forget"], data_dir=tmp_path)] == ["forget"]
    with pytest.raises(InputError, match="`sets`.*'retian'; did you mean 'retain'"):
        read_sets(files["forget"], names=["retian"], data_dir=tmp_path)
