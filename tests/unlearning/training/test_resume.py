"""A run that was killed goes on to the same weights, and what a kill or a full disk leaves is never taken for whole."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import trainer as parent

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.small_world import at_call, flat_weights, interrupt
from unlearning import InputError, train
from unlearning.training.output_directory import WHOLE, last_checkpoint
from unlearning.training.train import TrainResult

ROOT = Path(__file__).parents[3]
FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "progress": False,
    "device": "cpu",
    "max_steps": 8,
    "save_every": 3,
}


def with_dropout() -> LlamaForCausalLM:
    model = build_tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def killed(
    monkeypatch: pytest.MonkeyPatch, out: Path, *, method: str = "npo", call: int = 8, **settings: Any
) -> list[str]:
    """Train until the forget loss is called for the `call`-th time; the names of the checkpoints that are left."""
    with monkeypatch.context() as patched:
        at_call(patched, method, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(method, output_dir=out, **{**SHARED, **settings})
    return checkpoints_in(out)


def checkpoints_in(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir()) if out.exists() else []


def assert_same(one: TrainResult, other: TrainResult) -> None:
    torch.testing.assert_close(flat_weights(one.model), flat_weights(other.model), atol=0, rtol=0)
    assert one.history == other.history
    assert one.evaluations == other.evaluations


RUNS: dict[str, tuple[dict[str, Any], Callable[[], PreTrainedModel], int]] = {
    # Nine steps in three epochs: the checkpoint after step 6 is two steps into the second.
    "mid-epoch": ({"batch_size": 1, "max_steps": 9}, build_tiny_llama, 8),
    "epochs": ({"batch_size": 1, "max_steps": None, "epochs": 2}, build_tiny_llama, 6),
    "between two log lines": ({"logging_steps": 4}, build_tiny_llama, 8),
    "accumulation": ({"batch_size": 1, "gradient_accumulation_steps": 2}, build_tiny_llama, 14),
    "dropout": ({}, with_dropout, 8),
    "lora": ({"lora_rank": 2, "lora_dropout": 0.3}, build_tiny_llama, 8),
    "lion": ({"optimizer": "lion"}, build_tiny_llama, 8),
    "adamw_8bit": ({"optimizer": "adamw_8bit"}, build_tiny_llama, 8),
    "bf16_mixed": ({"precision": "bf16_mixed"}, build_tiny_llama, 8),
    "bfloat16": ({"precision": "bfloat16"}, build_tiny_llama, 8),
    "bfloat16, master": ({"precision": "bfloat16", "bfloat16_update": "master"}, build_tiny_llama, 8),
    "bfloat16, lion": ({"precision": "bfloat16", "optimizer": "lion"}, build_tiny_llama, 8),
    "bfloat16, adamw_8bit": ({"precision": "bfloat16", "optimizer": "adamw_8bit"}, build_tiny_llama, 8),
    "bfloat16, lora": ({"precision": "bfloat16", "lora_rank": 2}, build_tiny_llama, 8),
    "8 bit": ({"base_bits": 8, "lora_rank": 2}, build_tiny_llama, 8),
    "4 bit": ({"base_bits": 4, "lora_rank": 2}, build_tiny_llama, 8),  # of the maps with rows of 64
    "cosine": ({"lr_schedule": "cosine", "warmup_ratio": 0.5}, build_tiny_llama, 8),
    "few of many retain rows": (
        {"retain_loss": "kl", "retain": [replace(RETAIN[0], prompt=f"{place} is") for place in range(99)]},
        build_tiny_llama,
        8,
    ),
    "watched": ({"keep_best": "forget_nll"}, build_tiny_llama, 8),
}


@pytest.mark.parametrize("name", list(RUNS))
def test_a_killed_run_comes_to_the_same_weights(
    name: str, model_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, build, call = RUNS[name]
    # npo compares with its start and trains without dropout
    method = "grad_diff" if name in ("dropout", "lora") else "npo"

    def started() -> dict[str, Any]:
        model = build()
        model.name_or_path = str(model_dir)
        return {"model": model, "tokenizer": tokenizer, **options}

    whole = train(method, output_dir=tmp_path / "whole", **{**SHARED, **started()})
    left = killed(monkeypatch, tmp_path / "run", method=method, call=call, **started())
    assert [path for path in left if path != "best"] == (
        ["checkpoint-3"] if name == "epochs" else ["checkpoint-3", "checkpoint-6"]
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = train(method, output_dir=tmp_path / "run", resume=True, **{**SHARED, **started()})
    assert not resumed.already_done
    assert_same(resumed, whole)
    assert len(whole.history) > 1
    if name == "dropout":  # which must matter, or nothing was shown
        without = train(method, **{**SHARED, **started(), "model": build_tiny_llama(), "save_every": None})
        assert without.history != whole.history


def test_resuming_twice_and_elsewhere_in_the_run(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("npo", model=model_dir, **{**SHARED, "save_every": None})
    out = tmp_path / "run"
    assert killed(monkeypatch, out, call=5, model=model_dir) == ["checkpoint-3"]
    assert killed(monkeypatch, out, call=4, model=model_dir, resume=True) == ["checkpoint-3", "checkpoint-6"]
    # How often it is saved, and how many are kept, is no part of the configuration.
    again = train("npo", model=model_dir, output_dir=out, resume=True, **{**SHARED, "save_every": 1})
    assert_same(again, whole)


@pytest.mark.parametrize("options", [{"max_steps": 5}, {"max_steps": None, "epochs": 3}, {"stop": True}], ids=str)
def test_a_run_whose_end_could_not_be_saved_is_only_saved(
    options: dict[str, Any], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done and in the last checkpoint; to resume is to make none more."""
    settings: dict[str, Any] = {**SHARED, "lr_schedule": "constant", "warmup_ratio": 0, "save_every": 1, **options}
    if settings.pop("stop", False):
        settings |= {"stop_when": "forget_nll>6.5", "learning_rate": 5e-3}
    whole = train("npo", model=model_dir, output_dir=tmp_path / "whole", **settings)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("unlearning.training.run.write_tokenizer", full)
        with pytest.raises(
            InputError, match="run: no space left on the disk; the last complete checkpoint is .*checkpoint"
        ):
            train("npo", model=model_dir, output_dir=out, **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "unlearning.json"]
    steps: list[int] = []
    at_call(monkeypatch, "npo", 1, lambda: steps.append(1))
    resumed = train("npo", model=model_dir, output_dir=out, resume=True, **settings)
    assert_same(resumed, whole)
    assert steps == []


def test_what_is_not_asked_for_is_not_gone_on_with(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    killed(monkeypatch, out, model=model_dir)

    def refused(method: str = "npo", **changes: Any) -> str:
        with pytest.raises(InputError) as error:
            train(method, output_dir=out, **{**SHARED, "model": model_dir, **changes})
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "unfinished run, up to checkpoint-6. Set `resume`" in refused()
    assert "method is 'npo' there, 'simnpo' now" in refused("simnpo", resume=True)
    assert "seed is 0 there, 1 now" in refused(resume=True, seed=1)
    assert "its forget data differ" in refused(resume=True, forget=FORGET[:3])
    assert "its weights before training differ" in refused(
        resume=True, model=build_tiny_llama(1), tokenizer=tokenizer_of(model_dir)
    )
    assert checkpoints_in(out) == ["checkpoint-3", "checkpoint-6"]
    done = train("npo", model=model_dir, output_dir=out, resume=True, **SHARED)
    again = train("npo", model=model_dir, output_dir=out, resume=True, **SHARED)
    assert again.already_done and again.history == done.history and again.final == done.final


def tokenizer_of(model_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(model_dir)


def test_resuming_where_there_is_nothing_begins(model_dir: Path, tmp_path: Path) -> None:
    begun = train("npo", model=model_dir, output_dir=tmp_path / "run", resume=True, **SHARED)
    assert_same(begun, train("npo", model=model_dir, **{**SHARED, "save_every": None}))


def test_a_checkpoint_cut_short_is_not_resumed_from(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    killed(monkeypatch, out, model=model_dir)
    (out / "checkpoints" / "checkpoint-6" / WHOLE).unlink()  # it is written last
    (out / "checkpoints" / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(out) == out / "checkpoints" / "checkpoint-3"
    steps: list[int] = []
    with monkeypatch.context() as patched:
        at_call(patched, "npo", 1, lambda: steps.append(len(checkpoints_in(out))))
        resumed = train("npo", model=model_dir, output_dir=out, resume=True, **SHARED)
    assert steps == [1]  # it was gone when the first step began
    assert_same(resumed, train("npo", model=model_dir, **{**SHARED, "save_every": None}))


@pytest.mark.parametrize("where", ["weights", "optimizer", "mark"])
def test_a_disk_that_fills_while_a_checkpoint_is_saved(
    where: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each library says it in words of its own; what was whole stays, what was not goes."""
    out = tmp_path / "run"
    saved: list[int] = []

    def full_at_second(act: Callable[[], None], real: Any) -> Callable[..., Any]:
        def save(*args: Any, **kwargs: Any) -> Any:
            saved.append(1)
            if len(saved) == 2:
                act()
            return real(*args, **kwargs)

        return save

    def by_safetensors() -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def by_torch() -> None:
        real_save({"a": torch.zeros(10_000)}, "/dev/full")  # a real error of its own

    def by_the_system() -> None:
        raise OSError(28, "No space left on device")

    real_save, real_replace = torch.save, os.replace
    with monkeypatch.context() as patched:
        if where == "weights":
            patched.setattr(
                PreTrainedModel, "save_pretrained", full_at_second(by_safetensors, PreTrainedModel.save_pretrained)
            )
        elif where == "optimizer":
            name = "_save_optimizer_and_scheduler"
            patched.setattr(parent.Trainer, name, full_at_second(by_torch, getattr(parent.Trainer, name)))
        else:

            def replace(source: Any, target: Any) -> None:
                if Path(target).name == WHOLE:
                    full_at_second(by_the_system, real_replace)(source, target)
                else:
                    real_replace(source, target)

            patched.setattr(os, "replace", replace)
        with pytest.raises(InputError) as error:
            train("npo", model=model_dir, output_dir=out, **SHARED)
    assert "no space left on the disk; the last complete checkpoint is" in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoints_in(out) == ["checkpoint-3"]
    resumed = train("npo", model=model_dir, output_dir=out, resume=True, **SHARED)
    assert_same(resumed, train("npo", model=model_dir, **{**SHARED, "save_every": None}))


def test_a_disk_that_fills_at_once_leaves_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(InputError, match=r"run: no space left on the disk\."):
        train("npo", model=model_dir, output_dir=tmp_path / "run", **SHARED)
    assert list(tmp_path.iterdir()) == []


def test_control_c_while_a_checkpoint_is_saved_leaves_whole_ones(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parent.Trainer._save_rng_state

    def interrupted(self: parent.Trainer, folder: str) -> None:
        if folder.endswith("-6"):
            signal.raise_signal(signal.SIGINT)
        real(self, folder)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(parent.Trainer, "_save_rng_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("npo", model=model_dir, output_dir=out, **SHARED)
    assert checkpoints_in(out) == ["checkpoint-3"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_so_many_checkpoints_are_kept(keep: int, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("npo", model=model_dir, output_dir=out, **{**SHARED, "save_every": 2, "keep_checkpoints": keep})
    assert checkpoints_in(out) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)][-keep:]
    assert all((out / "checkpoints" / name / WHOLE).is_file() for name in checkpoints_in(out))
    assert not list(out.rglob("*.bin"))  # a pickle of the arguments, which the parent writes


def test_the_last_whole_checkpoint_is_there_until_the_next_is(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one checkpoint to keep, a kill just before the second is marked whole leaves the first."""
    out = tmp_path / "run"
    real = os.replace
    marks: list[Path | None] = []

    def watched(source: Any, target: Any) -> None:
        if Path(target).name == WHOLE:
            marks.append(last_checkpoint(out))
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    train("npo", model=model_dir, output_dir=out, **{**SHARED, "keep_checkpoints": 1})
    folder = out / "checkpoints"
    assert marks == [None, folder / "checkpoint-3", folder / "checkpoint-6"]


KILLED = """
import os, signal, sys
import pytest
from tests.unlearning.small_world import at_call
from tests.unlearning.training.test_resume import SHARED
from unlearning import train
at_call(pytest.MonkeyPatch(), "npo", 8, lambda: os.kill(os.getpid(), signal.SIGKILL))
train("npo", model=sys.argv[1], output_dir=sys.argv[2], **SHARED)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_can_be_resumed(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.run([sys.executable, "-c", KILLED, model_dir, out], cwd=ROOT, timeout=180)
    assert process.returncode == -signal.SIGKILL
    assert checkpoints_in(out) == ["checkpoint-3", "checkpoint-6"]
    resumed = train("npo", model=model_dir, output_dir=out, resume=True, **SHARED)
    assert_same(resumed, train("npo", model=model_dir, **{**SHARED, "save_every": None}))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="needs a file system of its own")
@pytest.mark.parametrize("kilobytes", [1100, 900, 700, 400, 100])
def test_a_file_system_that_is_really_full(kilobytes: int, model_dir: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(small)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        with pytest.raises(InputError, match="run: no space left on the disk") as error:
            train("npo", model=model_dir, output_dir=small / "run", **{**SHARED, "keep_checkpoints": 1})
        assert "\n" not in str(error.value)
        assert checkpoints_in(small / "run") == (["checkpoint-3"] if kilobytes > 600 else [])
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)  # lazily: the error holds a file open
