"""Adapters as other programs write them: each computes what peft computes, or is refused."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from dissect.models.model import load_model
from tests.unlearning.checkpoints.adapters import TOKENS, copied, logits, refused, rewritten, save_base, train_adapter
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import adapter_chain, base_of, check_files, is_adapter, weights_directory
from unlearning.checkpoints.lora import add_adapter, restore_adapter, save_adapter
from unlearning.common.errors import InputError


def trained_by_peft(directory: Path, base: Path, *, resize: int | None = None, **options: Any) -> Tensor:
    """Train a moment with peft itself, save the adapter as peft does, and return peft's own logits, not merged."""
    torch.manual_seed(1)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        start.resize_token_embeddings(resize, mean_resizing=False)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options})
    model = get_peft_model(start, config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(directory)
    return logits(model)


def build_tied() -> PreTrainedModel:
    config = build_tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


SHARED = TOKENS[0, :3].tolist()


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:Setting `save_emb", "ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"trainable_token_indices": SHARED},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_adapter_of_any_kind_computes_what_peft_computes(
    options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """A merge into tied embeddings would change both ends of the model."""
    base = save_base(tmp_path / "base", build_tied if tied else build_tiny_llama)
    if "ensure_weight_tying" in options and not tied:
        return
    wanted = trained_by_peft(tmp_path / "adapter", base, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
        merged = load_weights(tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    assert (logits(merged) - logits(load_weights(base))).abs().max() > 1e-2  # and it does something
    merged.save_pretrained(tmp_path / "merged")  # tied or not, it is saved whole
    torch.testing.assert_close(logits(load_weights(tmp_path / "merged")), logits(merged), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("end", ["embed_tokens", "lm_head", ""])
def test_an_adapter_of_one_tied_embedding_is_told_of_in_our_own_words(end: str, tied: bool) -> None:
    model = build_tied() if tied else build_tiny_llama()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        add_adapter(model, rank=2, alpha=4, targets=f".*({end or 'v_proj'}|q_proj)")
    assert len(told) == (1 if tied and end else 0)
    for warning in told:
        name = "model.embed_tokens" if end == "embed_tokens" else end
        assert str(warning.message).startswith(f"`lora_targets` adapts {name}, which this model ties")


@pytest.mark.parametrize("value", [None, False, [], 3, {"a": 1}], ids=str)
def test_fields_of_a_newer_peft_are_named_where_they_may_do_something(value: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    train_adapter(tmp_path / "adapter", base)
    before = logits(load_weights(tmp_path / "adapter"))
    rewritten(tmp_path / "adapter", new_field=value, peft_version="99.0")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(logits(load_weights(tmp_path / "adapter")), before)
    assert len(told) == bool(value)
    for warning in told:
        text = str(warning.message)
        assert text.startswith(str(tmp_path / "adapter" / "adapter_config.json"))
        assert "does not know new_field," in text and "install the peft that wrote it" in text


def test_tied_embeddings_that_no_adapter_touches_stay_tied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", build_tied)
    train_adapter(tmp_path / "adapter", base)
    merged = load_weights(tmp_path / "adapter")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:Setting `save_emb", "ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("rows", [400, 370], ids=["more", "fewer"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["plain", "saved"])
def test_an_adapter_over_resized_embeddings(options: dict[str, Any], tied: bool, rows: int, tmp_path: Path) -> None:
    if tied and options:
        return
    base = save_base(tmp_path / "base", build_tied if tied else build_tiny_llama)
    wanted = trained_by_peft(tmp_path / "adapter", base, resize=rows, **options)
    with pytest.warns(UserWarning, match=f"was trained with {rows} embeddings, its base .* has 384"):
        merged = load_weights(tmp_path / "adapter")
    assert merged.config.vocab_size == rows
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_emb", "ignore:.*gradient_checkpointing")
def test_an_adapter_that_lacks_some_of_its_embeddings_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    trained_by_peft(tmp_path / "adapter", base, resize=400, target_modules=["embed_tokens", "q_proj"])
    assert "was trained with 400 embeddings, its base" in refused(tmp_path / "adapter")


def test_an_adapter_of_a_quantized_base_is_merged_into_the_dequantized_one(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    save_base(tmp_path / "base")
    eight = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    eight.save_pretrained(tmp_path / "base8")
    with pytest.warns(UserWarning, match="they were dequantized"):
        load_weights(tmp_path / "base8").save_pretrained(tmp_path / "plain")
    trained = train_adapter(tmp_path / "adapter", tmp_path / "plain")
    rewritten(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base8"))
    with pytest.warns(UserWarning, match="base8: its weights are quantized"):
        merged = load_weights(tmp_path / "adapter")
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-5, rtol=1e-5)


def test_a_left_over_configuration_makes_no_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Full weights beside an adapter_config.json, which transformers would follow to another model."""
    path = copied(pair[0], tmp_path / "whole")
    shutil.copy(pair[1] / "adapter_config.json", path)
    assert not is_adapter(path)
    assert torch.equal(logits(load_weights(path)), logits(load_weights(pair[0])))
    (path / "adapter_config.json").write_text("{")
    assert torch.equal(logits(load_weights(path)), logits(load_weights(pair[0])))


def test_the_base_of_an_adapter_keeps_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base")
    commit = "0123456789" * 4
    train_adapter(tmp_path / "adapter", base)
    model = load_weights(base)
    add_adapter(model, rank=2, alpha=4, base=f"owner/name@{commit}")
    save_adapter(model, tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", commit)
    asked: list[str] = []
    monkeypatch.setattr("unlearning.checkpoints.locate._download", lambda name: asked.append(name) or base)
    assert base_of(tmp_path / "hub") == base
    assert asked == [f"owner/name@{commit}"]


QUERIES = {"target_modules": ["q_proj"]}


def saved_by_peft(directory: Path, base: Path, config: PeftConfig) -> nn.Module:
    """Save an adapter of any kind with random weights; return the model with it, not merged."""
    config.base_model_name_or_path = str(base)
    torch.manual_seed(1)
    model = get_peft_model(load_weights(base), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    model.eval().save_pretrained(directory)
    return model


def stored_as(path: Path, dtype: torch.dtype, *, pickled: bool = False, only: str = "") -> Path:
    """Store the floats of an adapter in another data type."""
    file = path / "adapter_model.safetensors"
    tensors = {
        name: (50 * tensor).to(dtype) if tensor.is_floating_point() and only in name else tensor
        for name, tensor in load_file(file).items()
    }
    if pickled:
        file.unlink()
        torch.save(tensors, path / "adapter_model.bin")
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*save_projection")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
        LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=4, **QUERIES),
        LoKrConfig(r=4, **QUERIES),
        VeraConfig(r=4, **QUERIES),
        ShiraConfig(r=4, **QUERIES),
    ],
    ids=["lora", "dora", "tokens", "ia3", "loha", "lokr", "vera", "shira"],
)
def test_an_adapter_of_integers_is_refused(config: PeftConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever its kind: SHiRA alone stores integers of its own, the indices of its weights."""
    base = save_base(tmp_path / "base")
    saved_by_peft(tmp_path / "adapter", base, copy.deepcopy(config))
    message = refused(stored_as(tmp_path / "adapter", dtype))
    assert "of the adapter's weights are stored as integers or 8-bit floats (base_model.model." in message


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("config", [ShiraConfig(r=4, **QUERIES), LoKrConfig(r=4, **QUERIES)], ids=["shira", "lokr"])
def test_other_kinds_of_adapters_compute_what_peft_computes(config: PeftConfig, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    trained = saved_by_peft(tmp_path / "adapter", base, copy.deepcopy(config))
    torch.testing.assert_close(logits(load_weights(tmp_path / "adapter")), logits(trained), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("only", ["lora_A", "layers.1.self_attn.v_proj.lora_B"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickled"])
def test_a_part_of_an_adapter_in_integers_is_refused(
    only: str, pickled: bool, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path = stored_as(copied(pair[1], tmp_path / "adapter"), torch.int8, pickled=pickled, only=only)
    assert "stored as integers or 8-bit floats" in refused(path, allow_pickle=True)
    resumed = load_weights(pair[0])
    add_adapter(resumed, rank=4, alpha=8)
    restore_adapter(resumed, pair[1])
    with pytest.raises(InputError, match="stored as integers or 8-bit floats"):
        restore_adapter(resumed, stored_as(copied(pair[1], tmp_path / "saved"), torch.int8, only=only))


def test_half_precision_and_scales_beside_an_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    half = stored_as(copied(pair[1], tmp_path / "half"), torch.bfloat16)
    assert not torch.equal(logits(load_weights(half)), logits(load_weights(pair[1])))
    scaled = copied(pair[1], tmp_path / "scaled")
    tensors = load_file(scaled / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {f"{name}_scale": torch.ones(1)}, scaled / "adapter_model.safetensors")
    assert f"its weights are quantized ({name}_scale)" in refused(scaled)


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"lora_alpha": "8"}, "lora_alpha must be a number, got '8'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"lora_alpha": True}, "lora_alpha must be a number, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number, got inf"),
        ({"lora_alpha": [8]}, r"lora_alpha must be a number, got \[8\]"),
        ({"r": "4"}, "r must be a number, got '4'"),
        ({"lora_dropout": {}}, "lora_dropout must be a number"),
        ({"peft_type": "FOO"}, "peft_type must be a kind of adapter that the installed peft knows.*got 'FOO'"),
        ({"peft_type": None}, "peft_type must be.*got None"),
        ({"peft_type": [1]}, r"peft_type must be.*got \[1\]"),
        ({"lora_bias": True}, "lora_B.*bias"),
    ],
    ids=str,
)
def test_what_is_wrong_in_an_adapters_configuration_is_named(
    changes: dict[str, Any], phrase: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path = copied(pair[1], tmp_path / "adapter")
    rewritten(path, **changes)
    message = refused(path)
    assert re.search(phrase, message) and message.startswith(str(path))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*lora_bias", "ignore:Adapter 'default'")
def test_a_bias_that_cannot_be_merged_is_no_fault_of_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    saved_by_peft(tmp_path / "adapter", base, LoraConfig(r=4, lora_bias=True, **QUERIES))
    message = refused(tmp_path / "adapter")
    assert "cannot be merged into its base" in message and "`lora_bias=True`" in message
    assert "name the base" not in message


@pytest.mark.parametrize("length", [2, 3])
def test_adapters_that_name_each_other_are_refused(length: int, pair: tuple[Path, Path], tmp_path: Path) -> None:
    paths = [copied(pair[1], tmp_path / f"adapter{number}") for number in range(length)]
    for path, base in zip(paths, [*paths[1:], paths[0]], strict=True):
        rewritten(path, base_model_name_or_path=str(base))
    entry = copied(pair[1], tmp_path / "entry")  # leads into the circle without being part of it
    rewritten(entry, base_model_name_or_path=str(paths[0]))
    for path in (entry, paths[0]):
        for read in (check_files, weights_directory, load_weights, load_tokenizer, load_model):
            with pytest.raises(InputError) as error:
                read(path)  # type: ignore[operator]
            message = str(error.value)
            assert "the adapters name each other" in message and "\n" not in message
            assert all(str(part) in message for part in paths)


def test_a_chain_of_adapters_ends_at_the_whole_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Each adds its own change; the tokenizer is that of the nearest directory that has one."""
    base, first = pair
    chain = [base]
    for number in range(3):
        chain.append(copied(first, tmp_path / f"adapter{number}"))
        rewritten(chain[-1], base_model_name_or_path=str(chain[-2]))
    assert adapter_chain(chain[-1]) == chain[::-1]
    assert weights_directory(chain[-1]) == base
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(["<between>"])
    tokenizer.save_pretrained(chain[1])
    assert "<between>" in load_tokenizer(chain[-1]).get_vocab()
    plain, once, thrice = (load_weights(path).state_dict() for path in (base, first, chain[-1]))
    for name, weight in plain.items():
        torch.testing.assert_close(thrice[name], weight + 3 * (once[name] - weight), atol=1e-5, rtol=1e-5)
