"""Run directories: one writer, and what is whole is used where something is broken."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from tests.other_process import other_process
from tests.unlearning.common.no_files import KINDS, make
from unlearning.common.errors import InputError
from unlearning.common.runs import Run, computing, file_name, open_run, read_finished, read_frame, read_record

ASKED = {"command": "patch", "seed": 0, "windows": [5, 1], "margin": 0.5}


def begin(path: Path, n_parts: int = 3, configuration: dict[str, object] = ASKED) -> Run:
    run = open_run(path, configuration, {"base": "b"})
    for number in range(n_parts):
        run.keep_part(f"part-{number}", pd.DataFrame({"x": [number, 0.5], "name": ["a", None]}))
    return run


def finish(run: Run) -> None:
    run.finish(pd.DataFrame({"x": [1]}), {"n": 1}, wall_time_s=1, measured={})


def names(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_a_second_process_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with other_process(lambda: begin(run)) as child:
        before = names(run)
        for configuration in (ASKED, ASKED | {"seed": 1}):
            with pytest.raises(InputError, match=f"being written by process {child} on|holds another run: its seed"):
                open_run(run, configuration, {})
        assert names(run) == before
    again = open_run(run, ASKED, {})  # it is dead now
    assert again.n_parts == 3
    finish(again)
    assert names(run) == ["results.parquet", "run.json", "summary.json"]


def test_two_that_start_together_with_different_options_do_not_mix(tmp_path: Path) -> None:
    """The second finds the directory claimed and not yet a run: it is refused, and leaves no trace."""
    run = tmp_path / "run"
    with other_process(lambda: (run.mkdir(), Run(run, {"status": "running"}).hold())):
        with pytest.raises(InputError, match="being written by process"):
            open_run(run, ASKED, {})
        assert names(run) == [".lock"]


def test_a_finished_run_is_open_to_all_and_held_while_it_is_added_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(begin(run))

    with other_process(lambda: open_run(run, ASKED, {})):
        assert open_run(run, ASKED, {}).is_complete
    with (
        other_process(open_run(run, ASKED, {}).hold),
        pytest.raises(InputError, match="being written"),
        computing(open_run(run, ASKED, {})),
    ):
        pass


def test_what_ends_a_run_gives_the_directory_back(tmp_path: Path) -> None:
    for name in ("finished", "stopped", "abandoned"):
        run = begin(tmp_path / name, n_parts=0 if name == "abandoned" else 1)
        if name == "finished":
            finish(run)
        elif name == "abandoned":
            run.abandon()
        else:
            with pytest.raises(KeyboardInterrupt), computing(run):
                raise KeyboardInterrupt
        assert not (run.path / ".lock").exists()
    assert not (tmp_path / "abandoned").exists()


def test_a_refused_directory_keeps_no_lock(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.pause(wall_time_s=1)
    with pytest.raises(InputError, match="holds another run"):
        open_run(run.path, ASKED | {"seed": 1}, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not a run directory"):
        open_run(tmp_path / "mine", ASKED, {})
    assert not list(tmp_path.rglob(".lock"))


def test_a_batch_that_was_cut_short_is_told_of_and_the_others_are_used(tmp_path: Path) -> None:
    begin(tmp_path / "run").pause(wall_time_s=1)
    broken = tmp_path / "run" / "parts" / "part-1.parquet"
    whole = broken.read_bytes()
    for content in (b"", whole[:4], whole[: len(whole) // 2], whole[:-1], b"no parquet at all"):
        broken.write_bytes(content)
        run = open_run(tmp_path / "run", ASKED, {})
        with pytest.warns(UserWarning, match=r"part-1\.parquet: broken or cut short; its batch is computed again"):
            parts = run.parts()
        assert [name for name, _ in parts] == ["part-0", "part-2"]
        assert not broken.exists()
        run.close()


def test_batches_beside_a_record_that_was_cut_short_are_used(tmp_path: Path) -> None:
    first = begin(tmp_path / "run")
    kept = first.parts()
    first.pause(wall_time_s=2)
    file = tmp_path / "run" / "run.json"
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-3], b"\xff\xfe", b"null"):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match=r"run\.json: broken or cut short; the 3 finished batches"):
            run = open_run(tmp_path / "run", json.loads(json.dumps(ASKED)), {"base": "b"})
        for (name, frame), (other, theirs) in zip(run.parts(), kept, strict=True):
            assert name == other
            assert_frame_equal(frame, theirs)
        assert json.loads(file.read_text())["configuration"] == json.loads(json.dumps(ASKED))
        run.pause(wall_time_s=1)
    finish(open_run(tmp_path / "run", ASKED, {}))
    assert names(tmp_path / "run") == ["results.parquet", "run.json", "summary.json"]


def test_batches_of_another_run_beside_a_broken_record_are_not_used(tmp_path: Path) -> None:
    begin(tmp_path / "run").pause(wall_time_s=1)
    (tmp_path / "run" / "run.json").write_text("{")
    before = names(tmp_path / "run")
    with pytest.raises(InputError, match=r"run\.json: broken: .*; start the run again in another directory"):
        open_run(tmp_path / "run", ASKED | {"seed": 1}, {})
    assert names(tmp_path / "run") == before


def test_killed_between_the_record_and_the_batches_leaves_no_batches_for_ever(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    (tmp_path / "kept").mkdir()
    for file in (tmp_path / "run" / "parts").iterdir():
        (tmp_path / "kept" / file.name).write_bytes(file.read_bytes())
    finish(run)
    (tmp_path / "kept").rename(tmp_path / "run" / "parts")
    with other_process(run.hold):
        assert open_run(tmp_path / "run", ASKED, {}).is_complete
        assert (tmp_path / "run" / ".lock").exists()
    assert open_run(tmp_path / "run", ASKED, {}).is_complete
    assert names(tmp_path / "run") == ["results.parquet", "run.json", "summary.json"]


@given(st.text())
def test_a_name_is_one_file_inside_its_directory(name: str) -> None:
    file = file_name(name)
    assert (Path("/run") / file).parent == Path("/run")
    assert file not in ("", ".", "..") and not file.startswith(".") and "\0" not in file and len(file) < 200


def test_different_names_are_different_files(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", ASKED, {})
    names = ["a/b", "a_b", "../a_b", "first attack", "x" * 200 + "1", "x" * 200 + "2"]
    for name in names:
        run.keep_part(name, pd.DataFrame({"name": [name]}))
    assert sorted(name for name, _ in run.parts()) == sorted(names)
    assert all(frame["name"].tolist() == [name] for name, frame in run.parts())
    assert len(list((tmp_path / "run" / "parts").iterdir())) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    run.close()


def change(path: Path, **entries: object) -> None:
    record = json.loads((path / "run.json").read_text()) | entries
    (path / "run.json").write_text(json.dumps({key: value for key, value in record.items() if value != "left out"}))


def refused(path: Path) -> list[str]:
    """What each reader of a run says."""
    said = []
    for read in (lambda: open_run(path, ASKED, {}), lambda: read_record(path), lambda: read_finished(path, "patch")):
        with pytest.raises(InputError) as error:
            read()
        said.append(str(error.value))
    assert not any("\n" in each or len(each) > 500 for each in said)
    return said


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, '{"format": ' + "9" * 5000 + "}", "{", "", "[1]", "3"]
)
def test_a_record_of_nonsense_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    finish(begin(tmp_path / "run"))
    (tmp_path / "run" / "run.json").write_text(text)
    for said in refused(tmp_path / "run"):
        assert "run.json: broken: " in said and "another directory" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("configuration", value) for value in ([1], None, "a", 3, "left out")),
        *(("wall_time_s", value) for value in ("1", None, [], float("nan"), float("inf"), True, "left out")),
        *(("status", value) for value in (["complete"], None, "done", 1, "left out")),
        *(("format", value) for value in ("1", [1], None, True, 1.5, "left out")),
    ],
)
def test_a_record_with_an_entry_of_another_type_is_refused(key: str, value: object, tmp_path: Path) -> None:
    finish(begin(tmp_path / "run"))
    change(tmp_path / "run", **{key: value})
    for said in refused(tmp_path / "run"):
        assert f"run.json: broken: {key} " in said


def test_batches_beside_a_record_that_lost_an_entry_are_used(tmp_path: Path) -> None:
    begin(tmp_path / "run").pause(wall_time_s=1)
    change(tmp_path / "run", wall_time_s="left out")
    with pytest.warns(UserWarning, match="the 3 finished batches beside it"):
        run = open_run(tmp_path / "run", ASKED, {})
    finish(run)
    assert read_finished(tmp_path / "run", "patch")["wall_time_s"] == 1


def test_a_record_of_another_version_may_have_other_entries(tmp_path: Path) -> None:
    finish(begin(tmp_path / "run"))
    change(tmp_path / "run", format=2, status="new", wall_time_s="left out")
    assert all("format 2, but this version reads format 1" in said for said in refused(tmp_path / "run"))


@pytest.mark.parametrize("what", KINDS)
def test_a_record_that_is_no_file_is_refused_at_once(what: str, tmp_path: Path) -> None:
    finish(begin(tmp_path / "run"))
    make(what, tmp_path / "run" / "run.json")
    assert all("run.json" in said for said in refused(tmp_path / "run"))


@pytest.mark.parametrize("what", KINDS)
def test_a_batch_that_is_no_file_is_computed_again(what: str, tmp_path: Path) -> None:
    begin(tmp_path / "run").pause(wall_time_s=1)
    make(what, tmp_path / "run" / "parts" / "part-1.parquet")
    make(what, tmp_path / "run" / ".x.part")
    make(what, tmp_path / "run" / "parts" / ".x.part")
    run = open_run(tmp_path / "run", ASKED, {})
    assert [name for name, _ in run.parts()] == ["part-0", "part-2"] and run.n_parts == 2
    finish(run)
    assert open_run(tmp_path / "run", ASKED, {}).is_complete
    assert "results.parquet" in names(tmp_path / "run")


@pytest.mark.parametrize("what", KINDS)
def test_a_table_that_is_no_file_is_refused_at_once(what: str, tmp_path: Path) -> None:
    make(what, tmp_path / "results.parquet")
    with pytest.raises(InputError, match="cannot be read"):
        read_frame(tmp_path / "results.parquet")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "b/" * 3000, "nowhere", "itself"])
def test_a_name_that_no_directory_can_have_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "itself").symlink_to("itself")
    refused(tmp_path / name)


@pytest.mark.parametrize("name", ["a" * 300, "b" * 5 + "/" + "a" * 300, "b/" * 3000])
def test_a_name_that_is_too_long_names_the_argument(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^`out`: .*[Nn]ame too long"):
        open_run(tmp_path / name, {}, {})
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
