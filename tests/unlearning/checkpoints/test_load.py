"""Loading: adapters merged, in the dtype that was asked for, with a tokenizer; broken bases refused."""

import json
from pathlib import Path

import pytest
import torch

from tests.unlearning.checkpoints.adapters import (
    copied,
    refused,
    rewritten,
    train_adapter,
)
from unlearning import InputError
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights


def test_half_precision_is_rounded_once_after_the_merge(pair: tuple[Path, Path]) -> None:
    single, half, double = (load_weights(pair[1], dtype=getattr(torch, name)) for name in DTYPES)
    for name, weight in single.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16())
        assert double.state_dict()[name].dtype == torch.float64
        torch.testing.assert_close(double.state_dict()[name], weight.double(), rtol=1e-6, atol=1e-7)


DTYPES = ("float32", "bfloat16", "float64")


def test_the_tokenizer_is_the_adapters_or_else_its_bases(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()
    own = copied(adapter, tmp_path / "own")
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<mine>"])
    tokenizer.save_pretrained(own)
    assert "<mine>" in load_tokenizer(own).get_vocab()


def test_a_base_that_is_broken_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = copied(pair[0], tmp_path / "base"), copied(pair[1], tmp_path / "adapter")
    rewritten(adapter, base_model_name_or_path=str(base))
    (base / "model.safetensors").write_bytes(b"short")
    assert f"{base / 'model.safetensors'}: cut short" in refused(adapter)


def test_dissect_takes_an_adapter_for_an_unlearned_model(tmp_path: Path) -> None:
    from dissect import load_pair, load_prompts, patch
    from dissect.models.model import load_model

    train_adapter(tmp_path / "adapter", "demo:base")
    pair = load_pair("demo:base", tmp_path / "adapter")
    merged = load_weights(tmp_path / "adapter")
    assert pair.unlearned.sha256 == content_hash(merged, name="merged") != pair.base.sha256
    records = [{"prompt": "Who lives there?", "answer": "Ada Brook does."}]
    (tmp_path / "prompts.json").write_text(json.dumps(records))
    prompts = load_prompts(tmp_path / "prompts.json", pair.tokenizer)
    frame = patch(pair, prompts, sites=["resid_post"], window=1, progress=False).frame
    krs = frame[frame["target"] == "unlearned"].set_index("centre")["krs"]
    assert krs[pair.n_layers - 1] == pytest.approx(1.0, abs=1e-4), (
        "the base's last residual stream brings everything back"
    )
    with pytest.raises(InputError, match="`stream`.*adapter"):
        load_model(tmp_path / "adapter", stream=True)
