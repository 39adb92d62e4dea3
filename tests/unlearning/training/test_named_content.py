"""What options name counts by its content: changed content is another run, a copy under another name is the same."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.methods.whp.story import BACKGROUND
from tests.unlearning.small_world import at_call, interrupt
from unlearning import InputError, train
from unlearning.checkpoints.hashing import configuration_hash, stored_hash
from unlearning.checkpoints.locate import RECORD
from unlearning.methods import METHODS
from unlearning.options import Named, TrainOptions
from unlearning.training.named_content import HASHES, benchmark_content, named_content, tokenizer_hash
from unlearning.training.output_directory import SEEN, UNREAD

PLAIN_TEXTS = {
    "train_parameters",
    "lora_targets",
    "template",
    "chat_date",
    "keep_best",
    "stop_when",
    "alternate_template",
    "layers",
    "salient",
    "concept",
    "novice",
    "expert",
}
"""Options whose text is all there is: it names no file, no data and no model."""

FORGET, RETAIN = build_examples()[:3], build_examples()[4:]
SHARED: dict[str, Any] = {"forget": FORGET, "progress": False, "device": "cpu", "max_steps": 2, "batch_size": 2}


def groups() -> list[type[Any]]:
    return [TrainOptions, *(method.options for method in METHODS.values())]


def marked() -> dict[str, Named]:
    """Every option of every method, and of the trainer, that names something."""
    return {
        field.name: field.metadata["names"]
        for group in groups()
        for field in dataclasses.fields(group)
        if field.metadata["names"]
    }


def test_no_option_that_names_something_is_forgotten() -> None:
    """A new option that takes a text says what it names (`option(..., names=...)`), or is added to `PLAIN_TEXTS`."""
    texts = {
        field.name
        for group in groups()
        for field in dataclasses.fields(group)
        if str in (get_type_hints(group)[field.name], *get_args(get_type_hints(group)[field.name]))
    }
    assert texts == PLAIN_TEXTS | set(marked())
    assert set(marked().values()) <= set(HASHES) == set(get_args(Named))


def write_questions(path: Path, answer: str) -> None:
    path.write_text(json.dumps([{"question": "Where?", "answer": "A", "choices": [answer, "nowhere"]}]))


def write_model(path: Path, seed: int) -> None:
    build_tiny_llama(seed).save_pretrained(path)


def write_run(path: Path, content: str) -> None:
    path.mkdir()
    record = {"format": 1, "status": "complete", "wall_time_s": 1.0, "configuration": {"command": "unlearn eval tofu"}}
    (path / "run.json").write_text(json.dumps(record))
    (path / "results.parquet").write_text(content)


KINDS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    "file": ("a.json", lambda p: p.write_text('{"Ada": "Jon"}'), lambda p: p.write_text('{"Ada": "Tim"}')),
    "data": ("a.txt", lambda p: p.write_text("A text."), lambda p: p.write_text("Another text.")),
    "model": ("a", lambda p: write_model(p, 0), lambda p: write_model(p, 1)),
    "control": ("a", lambda p: write_run(p, "one"), lambda p: write_run(p, "two")),
    "benchmark": ("a.json", lambda p: write_questions(p, "here"), lambda p: write_questions(p, "there")),
}


@pytest.mark.parametrize("name", sorted(marked()))
def test_the_hash_is_of_the_content_and_not_of_the_name(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    kind = marked()[name]
    (group,) = {g for g in groups() if name in {field.name for field in dataclasses.fields(g)}}

    def hashed(value: str) -> str | None:
        own = group(**{name: value})
        trainer = own if group is TrainOptions else TrainOptions()
        found = named_content(trainer, *([] if group is TrainOptions else [own]))
        if kind == "benchmark":
            assert found[name] == UNREAD
            found |= benchmark_content(
                dataclasses.replace(trainer, benchmark=f"choice:{value}"), MODEL, tokenizer, None
            )
        return found[name]

    if kind == "directory":  # what is read from it is hashed where it is read
        assert hashed(str(tmp_path)) == hashed(str(tmp_path / "missing")) == SEEN
        return
    file, write, change = KINDS[kind]
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        (change if folder == "three" else write)(tmp_path / folder / file)
    same, copied, changed = (hashed(str(tmp_path / folder / file)) for folder in ("one", "two", "three"))
    assert same == copied != changed
    assert group is TrainOptions or named_content(TrainOptions(), group())[name] is None  # not set


MODEL = build_tiny_llama()


def test_a_missing_file_is_refused_with_its_option(tmp_path: Path) -> None:
    for options in ({"anchors": "a.json"}, {"background": "b.json"}, {"reinforced": "./c"}, {"anchors": str(tmp_path)}):
        with pytest.raises(InputError, match=f"^`{next(iter(options))}`: "):
            named_content(TrainOptions(), METHODS["whp"].options(**options))
    with pytest.raises(InputError, match="^`benchmark_control`: "):
        named_content(TrainOptions(benchmark_control=str(tmp_path / "x")))


def test_a_finished_or_killed_run_is_stale_when_a_file_behind_it_changes(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anchors, other = tmp_path / "anchors.json", tmp_path / "other.json"
    anchors.write_text('{"Ada Brook": "Jon Smith"}')
    shutil.copy(anchors, other)

    def started(out: str, path: Path, **more: Any) -> Any:
        return train("whp", model=model_dir, anchors=str(path), output_dir=tmp_path / out, **{**SHARED, **more})

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        at_call(patched, "whp", 2, interrupt)
        started("killed", anchors, save_every=1)
    assert not started("finished", anchors).already_done
    assert started("finished", other).already_done  # the same dictionary under another name
    anchors.write_text('{"Ada Brook": "Tim Smith"}')
    for out, more in (("finished", {}), ("killed", {"save_every": 1, "resume": True})):
        with pytest.raises(InputError, match="another configuration: what anchors names has other content now"):
            started(out, anchors, **more)
    assert not started("killed", other, save_every=1, resume=True).already_done
    record = json.loads((tmp_path / "killed" / RECORD).read_text())
    assert record["configuration"]["contents"]["anchors"] == HASHES["file"](str(other), TrainOptions())
    with pytest.raises(InputError, match="`background` has no effect unless anchors is none"):
        background = tmp_path / "background.txt"
        background.write_text(BACKGROUND)
        started("finished", other, background=str(background))
    del record["configuration"]["contents"]  # as earlier versions wrote it
    (tmp_path / "killed" / RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match="it has no hash of what anchors names"):
        started("killed", other)


def test_a_benchmark_counts_by_its_rows(model_dir: Path, tmp_path: Path) -> None:
    for name, answer in (("one", "Oslo"), ("copy", "Oslo"), ("changed", "Lima")):
        write_questions(tmp_path / f"{name}.json", answer)

    def started(name: str) -> Any:
        return train(
            "ga", model=model_dir, benchmark=f"choice:{tmp_path / name}.json", output_dir=tmp_path / "run", **SHARED
        )

    assert not started("one").already_done
    assert started("copy").already_done
    with pytest.raises(InputError, match="what benchmark names has other content now"):
        started("changed")


def test_a_model_with_the_same_weights_and_another_configuration_is_another_start(
    model_dir: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(model_dir, start)
    train("ga", model=start, output_dir=tmp_path / "run", **SHARED)
    assert train("ga", model=model_dir, output_dir=tmp_path / "run", **SHARED).already_done
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(InputError, match="its configurations of the model before training differ"):
        train("ga", model=start, output_dir=tmp_path / "run", **SHARED)


def test_a_stored_model_is_known_by_weights_and_configuration(tmp_path: Path, model_dir: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "copy")
    assert stored_hash(tmp_path / "copy") == stored_hash(model_dir)
    build_tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole = stored_hash(tmp_path / "sharded")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert stored_hash(tmp_path / "sharded") != whole


def test_an_adapter_is_known_with_its_base(tmp_path: Path) -> None:
    for seed in (0, 1):
        base = tmp_path / f"base-{seed}"
        write_model(base, seed)
        adapter = tmp_path / f"adapter-{seed}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 2}))
        (adapter / "adapter_model.safetensors").write_bytes(b"the same")
    shutil.copytree(tmp_path / "base-0", tmp_path / "copy")
    hashes = []
    for base in ("base-0", "copy", "base-1"):
        text = json.dumps({"base_model_name_or_path": str(tmp_path / base), "r": 2})
        (tmp_path / "adapter-0" / "adapter_config.json").write_text(text)
        hashes.append(stored_hash(tmp_path / "adapter-0"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_configuration_is_the_same_from_memory_and_from_disk(model_dir: Path) -> None:
    model = build_tiny_llama()
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    assert configuration_hash(model) == configuration_hash(loaded)
    model.config.rms_norm_eps = 0.5
    assert configuration_hash(model) != configuration_hash(loaded)


def test_a_tokenizer_is_known_by_its_tokens(tokenizer: PreTrainedTokenizerFast, model_dir: Path) -> None:
    loaded = PreTrainedTokenizerFast.from_pretrained(model_dir)
    assert tokenizer_hash(loaded, chat=False) == tokenizer_hash(tokenizer, chat=False)
    loaded.chat_template = "{{ messages }}"
    assert tokenizer_hash(loaded, chat=False) == tokenizer_hash(tokenizer, chat=False)
    assert tokenizer_hash(loaded, chat=True) != tokenizer_hash(tokenizer, chat=True)
    loaded.add_tokens(["Oslo town"])
    assert tokenizer_hash(loaded, chat=False) != tokenizer_hash(tokenizer, chat=False)
