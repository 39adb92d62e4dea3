"""A run on disk: its record, its table, its content hashes, and files that are whole or not there."""

import json
import os
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from dissect.sweeps.result import SweepResult, load_result
from tests.dissect.cli.helpers import Outcome, World, build_llama, save, unfinished_files, with_noise
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_weights
from unlearning.common.errors import InputError
from unlearning.common.runs import open_run, write_bytes, write_frame, write_json, write_whole

CONTRACT = [
    *["target", "kind", "site", "centre", "first_layer", "last_layer", "example", "group", "n_answer_tokens"],
    *["loss_unlearned", "loss_intervened", "krs", "logprob_recovery", "kl_recovery"],
]
"""The columns of patch and restore in DESIGN.md."""


def test_directory_holds_the_contract_s_files_and_nothing_else(finished: tuple[Path, Outcome]) -> None:
    run, _ = finished
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    figures = {
        f"figures/{name}" for name in ("krs.html", "difference.html", "examples.html", "krs.csv", "difference.csv")
    }
    assert names == {"run.json", "results.parquet", "summary.json"} | figures


def test_table_has_the_contract_s_columns_and_a_row_per_example_and_intervention(
    finished: tuple[Path, Outcome],
) -> None:
    frame = pd.read_parquet(finished[0] / "results.parquet")
    assert set(CONTRACT) <= set(frame.columns)
    assert [name for name in frame.columns if name in CONTRACT] == CONTRACT
    assert not frame.duplicated(["target", "site", "centre", "example"]).any()
    assert len(frame) == 2 * 3 * 3 * 6  # targets, sites, centres, examples
    assert set(frame["target"]) == {"unlearned", "control"}
    assert set(frame["kind"]) == {"patch"}
    windows = frame[["centre", "first_layer", "last_layer"]].drop_duplicates().to_numpy().tolist()
    assert windows == [[0, 0, 1], [1, 0, 2], [2, 1, 2]]
    for name in ("loss_unlearned", "loss_intervened", "krs", "logprob_recovery", "kl_recovery"):
        assert frame[name].dtype == "float64"
    assert ((1 - frame["loss_intervened"] / frame["loss_unlearned"] - frame["krs"]).abs() < 1e-12).all()


def test_record_says_what_was_computed_with_what(world: World, finished: tuple[Path, Outcome]) -> None:
    record = json.loads((finished[0] / "run.json").read_text())
    configuration = record["configuration"]
    assert record["status"] == "complete"
    for name, path in (("base", world.base), ("unlearned", world.unlearned), ("control", world.control)):
        assert record[name] == str(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        assert configuration[f"{name}_sha256"] == content_hash(model, name=name)
    assert record["data"] == str(world.data)
    assert len(configuration["data_sha256"]) == 64
    assert {
        key: configuration[key]
        for key in ("seed", "windows", "direction", "donors", "null", "scoring", "engine", "dtype", "device")
    } == {
        "seed": 7,
        "windows": ["3"],
        "direction": "base-to-unlearned",
        "donors": [],
        "null": 0,
        "scoring": "answer",
        "engine": "wavefront",
        "dtype": "float32",
        "device": configuration["device"],
    }
    assert configuration["sites"] == ["mlp_coef", "attn_out", "mlp_coef+attn_out"]
    for package in ("dissect-unlearning", "torch", "transformers", "transformer-lens"):
        assert record["versions"][package] == version(package)
    started, finished_at = datetime.fromisoformat(record["started"]), datetime.fromisoformat(record["finished"])
    assert started <= finished_at
    # `started` and `finished` are whole seconds.
    assert 0 < record["wall_time_s"] <= (finished_at - started).total_seconds() + 1
    assert 50e6 < record["peak_memory_bytes"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_record_holds_the_plan_and_what_became_of_it(finished: tuple[Path, Outcome]) -> None:
    record = json.loads((finished[0] / "run.json").read_text())
    plan = record["plan"]
    assert (plan["passes"], plan["examples_per_batch"], plan["interventions_per_pass"]) == (1, 6, 3 * 3)
    assert plan["chunk_tokens"] == record["chunk_tokens"] == 100
    assert 3 * 3 + 1 <= plan["most_copies"] <= 2 * (3 * 3 + 1)
    assert 0 < plan["flops"] < plan["naive_flops"]
    assert 0 < plan["bytes_beside_weights"] <= plan["budget_bytes"]
    assert record["bytes_read"] == 0  # nothing was streamed
    assert record["processes"] == 1
    assert record["threads"] == torch.get_num_threads()


def test_note_is_written_at_once_and_is_no_part_of_the_configuration(tmp_path: Path) -> None:
    open_run(tmp_path / "run", {"seed": 0}, {}).note(plan={"passes": 3}, processes=2)
    again = open_run(tmp_path / "run", {"seed": 0}, {})
    assert (again.record["plan"], again.record["processes"]) == ({"passes": 3}, 2)
    assert again.record["configuration"] == {"seed": 0}


def test_joining_a_run_leaves_what_others_are_writing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run(run, {"seed": 0}, {})
    half = run / ".results.parquet.999999.part"
    half.write_text("PAR")
    assert open_run(run, {"seed": 0}, {}, joins=True).record["configuration"] == {"seed": 0}
    assert half.exists()
    open_run(run, {"seed": 0}, {})
    assert not half.exists()


def test_saved_result_is_read_back_as_it_was(finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    result = load_result(finished[0])
    assert isinstance(result, SweepResult)
    saved = result.save(tmp_path / "copy")
    again = load_result(saved)
    pd.testing.assert_frame_equal(again.frame, result.frame)
    assert again.configuration == result.configuration
    assert json.loads((saved / "summary.json").read_text()) == json.loads((finished[0] / "summary.json").read_text())


def test_content_hash_is_of_the_numbers_and_not_of_the_files(tmp_path: Path) -> None:
    device = torch.device("cpu")
    model = with_noise(build_llama(), seed=3)
    model.bfloat16()
    halved = save(tmp_path / "bfloat16", model)
    sharded = save(tmp_path / "sharded", model, shard="10KB")
    widened = save(tmp_path / "float32", model.float())
    assert len(list(sharded.glob("*.safetensors"))) > 2
    hashes = {
        content_hash(load_weights(path, device=device, dtype=dtype), name=path.name)
        for path in (halved, sharded, widened)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }
    assert len(hashes) == 1
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] += 2**-10
    assert content_hash(model, name="changed") not in hashes


def test_content_hash_tells_tensors_of_equal_bytes_apart() -> None:
    model = build_llama()
    before = content_hash(model, name="model")
    with torch.no_grad():
        first, second = (model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    assert content_hash(model, name="model") != before


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "table.json"
    write_bytes(file, b"old")

    def half(part: Path) -> None:
        part.write_bytes(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(file, half)
    assert file.read_bytes() == b"old"
    assert unfinished_files(tmp_path) == []
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new"


def test_table_on_a_full_disk_is_refused_with_what_to_do(tmp_path: Path) -> None:
    part = tmp_path / f".results.parquet.{os.getpid()}.part"
    part.symlink_to("/dev/full")
    frame = pd.DataFrame({"krs": [0.5] * 100})
    with pytest.raises(InputError, match=r"results\.parquet: the disk is full"):
        write_frame(tmp_path / "results.parquet", frame)
    assert list(tmp_path.iterdir()) == []


def test_json_has_null_where_there_is_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [float("nan"), {"b": float("inf")}, 1.5], "c": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, {"b": None}, 1.5], "c": None}


def test_opening_sweeps_up_what_a_killed_process_left(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.999999.part").write_text('{"form')  # killed before anything was whole
    opened = open_run(run, {"seed": 0}, {})
    opened.keep_part("unlearned-00000", pd.DataFrame({"krs": [1.0]}))
    (run / "parts" / ".unlearned-00001.parquet.999999.part").write_text("PAR")
    again = open_run(run, {"seed": 0}, {})
    assert unfinished_files(run) == []
    assert again.n_parts == 1
    ((name, kept),) = again.parts()
    assert (name, kept["krs"].tolist()) == ("unlearned-00000", [1.0])


def test_time_of_a_run_that_stopped_is_counted(tmp_path: Path) -> None:
    open_run(tmp_path / "run", {"seed": 0}, {}).pause(wall_time_s=2.5)
    again = open_run(tmp_path / "run", {"seed": 0}, {})
    assert not again.is_complete
    again.finish(pd.DataFrame({"krs": [1.0]}), {}, wall_time_s=1.25, measured={"bytes_read": 12})
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["wall_time_s"], record["bytes_read"]) == (3.75, 12)
    assert open_run(tmp_path / "run", {"seed": 0}, {}).is_complete


def test_record_of_another_version_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path / "run", {"seed": 0}, {})
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format.*99"):
        open_run(tmp_path / "run", {"seed": 0}, {})
