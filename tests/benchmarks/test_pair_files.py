"""The random pair on disk is whole, loads with transformers, and is written once."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import NOISE, build_config, build_tokenizer
from benchmarks.pair_files import PairFiles, plan_shards, tensor_sizes, write_pair, write_questions
from benchmarks.shapes import SHAPES
from dissect.prompts.loading import load_prompts
from unlearning.common.errors import InputError

TINY = SHAPES["tiny"]
SHARD = 100_000


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> PairFiles:
    return write_pair(TINY, tmp_path_factory.mktemp("pair") / "tiny", shard_bytes=SHARD)


def test_both_models_load_with_transformers_and_differ_by_the_noise(written: PairFiles) -> None:
    base, unlearned = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (written.base, written.unlearned)
    )
    assert type(base).__name__ == "LlamaForCausalLM"
    assert base.config.num_hidden_layers == 6 and base.config.num_key_value_heads == 2
    changed = unlearned.state_dict()
    for name, ours in base.state_dict().items():
        theirs = changed[name]
        if ours.dim() == 1:
            assert torch.equal(ours, theirs) and bool((ours == 1).all()), name
        else:
            ratio = float((theirs - ours).std() / ours.std())
            assert ratio == pytest.approx(NOISE, rel=0.1), name
            assert abs(float(torch.corrcoef(torch.stack([(theirs - ours).flatten(), ours.flatten()]))[0, 1])) < 0.1
    logits = base(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, TINY.vocab) and bool(torch.isfinite(logits).all())


def test_files_are_bfloat16_shards_of_at_most_the_size_asked_for(written: PairFiles) -> None:
    for folder in (written.base, written.unlearned):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 2 and {path.name for path in shards} == set(index["weight_map"].values())
        assert all(path.stat().st_size < SHARD + 20_000 for path in shards)  # and the header
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    n_values = sum(size.numel() for size in tensor_sizes(TINY).values())
    assert index["metadata"]["total_size"] == 2 * n_values
    assert written.weight_bytes == pytest.approx(2 * n_values, rel=0.05)


def test_the_same_numbers_whatever_the_shards(written: PairFiles, tmp_path: Path) -> None:
    other = write_pair(TINY, tmp_path / "tiny")
    assert len(list(other.base.glob("*.safetensors"))) == 1
    ours, theirs = (AutoModelForCausalLM.from_pretrained(pair.unlearned).state_dict() for pair in (written, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    reseeded = write_pair(TINY, tmp_path / "reseeded", seed=1)
    third = AutoModelForCausalLM.from_pretrained(reseeded.unlearned).state_dict()
    assert not torch.equal(ours["lm_head.weight"], third["lm_head.weight"])


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own() -> None:
    sizes = {name: torch.Size([elements]) for name, elements in {"a": 4, "b": 50, "c": 4, "d": 5, "e": 2}.items()}
    assert plan_shards(sizes, 20) == [["a"], ["b"], ["c", "d"], ["e"]]


def test_a_pair_is_written_once_and_another_one_is_not_written_over_it(tmp_path: Path) -> None:
    told: list[int] = []
    pair = write_pair(TINY, tmp_path / "pair", shard_bytes=SHARD, advance=told.append)
    assert sum(told) == 2 * 2 * sum(size.numel() for size in tensor_sizes(TINY).values())
    times = {path: path.stat().st_mtime_ns for path in pair.base.iterdir()}
    write_pair(replace(TINY, prompts=1, tokens=30), tmp_path / "pair", shard_bytes=SHARD)
    assert {path: path.stat().st_mtime_ns for path in pair.base.iterdir()} == times
    with pytest.raises(InputError, match="holds another pair; remove it or name another --disk"):
        write_pair(replace(TINY, n_layers=7), tmp_path / "pair", shard_bytes=SHARD)


def test_a_writer_that_was_stopped_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = tmp_path / "pair"

    def stop(_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pair(TINY, folder, shard_bytes=30_000, advance=stop)
    assert not (folder / "pair.json").exists()
    assert list((folder / "base").glob("*.safetensors"))
    pair = write_pair(TINY, folder, shard_bytes=SHARD)
    index = json.loads((pair.base / "model.safetensors.index.json").read_text())
    assert {path.name for path in pair.base.glob("*.safetensors")} == set(index["weight_map"].values())


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**12, 10**12 - 20 * 10**9, 20 * 10**9))
    with pytest.raises(InputError, match=r"takes 28\.3 GB and 20\.0 GB are free; name a larger place with --disk"):
        write_pair(SHAPES["7b"], tmp_path / "7b")
    assert not (tmp_path / "7b").exists()


def test_questions_have_exactly_the_tokens_asked_for(written: PairFiles, tmp_path: Path) -> None:
    shape = replace(TINY, prompts=4, tokens=9, answer=2)
    path = write_questions(tmp_path / "questions.jsonl", shape)
    tokenizer = AutoTokenizer.from_pretrained(written.base)
    items = load_prompts(path, tokenizer).items
    assert len(items) == 4
    assert {(len(item.input_ids), item.n_answer_tokens) for item in items} == {(9, 2)}
    assert len({item.input_ids for item in items}) == 4


def test_the_tokenizer_has_a_token_for_every_row_of_the_embedding() -> None:
    tokenizer = build_tokenizer(50)
    assert len(tokenizer) == 50 == build_config(replace(TINY, vocab=50)).vocab_size
    assert tokenizer("w3 w49 w0")["input_ids"] == [3, 49, 0]
