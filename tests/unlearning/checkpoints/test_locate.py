"""Finding an adapter's base, and files that are missing or broken."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForCausalLM,
)

from tests.unlearning.checkpoints.adapters import copied, logits, refused, rewritten, save_base, train_adapter
from unlearning.checkpoints.load import load_weights


def test_an_adapter_finds_its_base_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    train_adapter(Path("adapter"), "base")
    monkeypatch.chdir("/")
    assert isinstance(load_weights(tmp_path / "adapter"), LlamaForCausalLM)


def test_incomplete_adapters_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return copied(pair[1], tmp_path / name)

    short = broken("short")
    content = (short / "adapter_model.safetensors").read_bytes()
    (short / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    assert "adapter_model.safetensors: cut short or not safetensors" in refused(short)

    none = broken("none")
    (none / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: missing, though there is an adapter_config.json" in refused(none)

    pickled = broken("pickled")
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    assert "only pickled adapter weights" in refused(pickled) and "`allow_pickle`" in refused(pickled)
    assert torch.equal(logits(load_weights(pickled, allow_pickle=True)), logits(load_weights(pair[1])))

    nan = broken("nan")
    factors = load_file(nan / "adapter_model.safetensors")
    factors[next(iter(factors))][0, 0] = torch.nan
    save_file(factors, nan / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "the adapter's tensor base_model.model." in refused(nan) and "not finite" in refused(nan)

    gone = broken("gone")
    rewritten(gone, base_model_name_or_path=str(tmp_path / "nowhere"))
    assert f"its base cannot be found: {tmp_path}/nowhere: no such directory" in refused(gone)
    rewritten(gone, base_model_name_or_path=None)
    assert "adapter_config.json: names no base" in refused(gone)
    rewritten(gone, base_model_name_or_path=str(gone))
    assert "adapter_config.json: names itself as its base" in refused(gone)
    rewritten(gone, base_model_name_or_path=str(pair[0]), peft_type="NO_SUCH")
    assert "NO_SUCH" in refused(gone)
    rewritten(gone, peft_type="PROMPT_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "changes no weights, so it cannot be merged" in refused(gone)
    (gone / "adapter_config.json").write_text("{")
    assert "adapter_config.json: broken; copy it again" in refused(gone)
    assert "`device`" in refused(pair[1], device="auto")
