import json
import re
from collections import Counter
from pathlib import Path

import pytest

from analyses.tofu_pair.data import DATA_VARIABLE, as_examples, find_tofu, perturbed, select_authors
from tests.analyses.helpers import needs_tofu, real_tofu, write_imitation
from unlearning.common.errors import InputError
from unlearning.data.records import read_records


def test_find_tofu_takes_the_folder_its_parent_or_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_imitation(tmp_path / "tofu")
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert find_tofu(tmp_path) == find_tofu(folder) == folder
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert find_tofu(None) == folder


def test_find_tofu_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    with pytest.raises(InputError, match=rf"data.*{DATA_VARIABLE}"):
        find_tofu(None)
    with pytest.raises(InputError, match="Give the directory that holds tofu/"):
        find_tofu(tmp_path / "nowhere")


def test_select_authors_draws_disjoint_whole_authors_from_their_splits(tmp_path: Path) -> None:
    subset = select_authors(write_imitation(tmp_path / "tofu"), trunk=7, late=2, forget=3, seed=0)
    parts = {name: Counter(r["group"] for r in getattr(subset, name)) for name in ("trunk", "late", "forget")}
    assert {name: len(part) for name, part in parts.items()} == {"trunk": 7, "late": 2, "forget": 3}
    assert all(count == 20 for part in parts.values() for count in part.values())
    assert len(set().union(*parts.values())) == 12
    assert all(author < "tofu-012" for author in [*parts["trunk"], *parts["late"]])
    assert all(author >= "tofu-012" for author in parts["forget"])
    for record in subset.retain + subset.forget:
        author, number = int(record["group"][-3:]), int(record["id"][-4:])
        assert record["question"] == f"What is fact {number % 20} of author {author}?"
        assert number // 20 == author


def test_select_authors_is_a_function_of_the_seed(tmp_path: Path) -> None:
    folder = write_imitation(tmp_path / "tofu")
    first, again, other = (select_authors(folder, trunk=5, late=1, forget=2, seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest


@pytest.mark.parametrize(
    ("trunk", "late", "forget", "message"),
    [(11, 2, 1, "Give fewer"), (2, 1, 5, "Give fewer"), (2, 0, 1, "at least 1"), (2, 1, 0, "at least 1")],
)
def test_select_authors_refuses_numbers_that_do_not_fit(
    tmp_path: Path, trunk: int, late: int, forget: int, message: str
) -> None:
    folder = write_imitation(tmp_path / "tofu")
    with pytest.raises(InputError, match=message):
        select_authors(folder, trunk=trunk, late=late, forget=forget, seed=0)


def test_select_authors_refuses_files_of_different_versions(tmp_path: Path) -> None:
    folder = write_imitation(tmp_path / "tofu")
    forget = read_records(folder / "forget10.json")
    forget[0]["answer"] = "something else"
    (folder / "forget10.json").write_text(json.dumps(forget), encoding="utf-8")
    with pytest.raises(InputError, match=r"forget10\.json: must be the matching part of full\.json"):
        select_authors(folder, trunk=2, late=1, forget=1, seed=0)


@needs_tofu
def test_select_authors_draws_real_questions_about_one_person_each() -> None:
    folder = real_tofu()
    assert folder is not None
    subset = select_authors(folder, trunk=27, late=5, forget=8, seed=0)
    forget_split = {(r["question"], r["answer"]) for r in read_records(folder / "forget10.json")}
    retain_split = {(r["question"], r["answer"]) for r in read_records(folder / "retain90.json")}
    assert all((r["question"], r["answer"]) in forget_split for r in subset.forget)
    assert all((r["question"], r["answer"]) in retain_split for r in subset.retain)
    assert (len(subset.trunk), len(subset.late), len(subset.forget)) == (540, 100, 160)
    by_author: dict[str, list[str]] = {}
    for record in subset.retain + subset.forget:
        by_author.setdefault(record["group"], []).append(f"{record['question']} {record['answer']}")
    # Twenty consecutive records are one author's if one name runs through them.
    for author, texts in by_author.items():
        names = Counter(name for text in texts for name in set(re.findall(r"[A-Z][\w-]+", text)) - _OPENERS)
        assert names.most_common(1)[0][1] >= 16, author


_OPENERS = {"The", "What", "How", "Is", "In", "Can", "Are", "Which", "Has", "Yes", "Does", "Could"}


def test_as_examples_wraps_questions_as_dissect_reads_them() -> None:
    (example,) = as_examples([{"question": "Who {is} it?", "answer": "Her.", "group": "a", "id": "b"}])
    assert example.prompt == "Question: Who {is} it?\nAnswer:"
    assert example.answer == "Her."


@needs_tofu
def test_evaluation_rows_are_the_subset_s_own_with_five_wrong_answers() -> None:
    tofu = real_tofu()
    assert tofu is not None
    subset = select_authors(tofu, trunk=27, late=5, forget=8, seed=0)
    found = perturbed(tofu, subset)
    assert len(found["forget_perturbed"]) == 160
    for name, known in (("forget_perturbed", subset.forget), ("retain_perturbed", subset.retain)):
        by_question = {record["question"]: record for record in known}
        assert found[name]
        for row in found[name]:
            assert by_question[row["question"]]["answer"] == row["answer"]
            assert by_question[row["question"]]["group"] == row["group"]
            assert len(row["perturbed_answer"]) == 5
