"""Adapters: trained in place, saved as peft's, merged on load; against the formula and against peft itself."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tests.unlearning.checkpoints.adapters import (
    BUILDERS,
    build_gpt2,
    copied,
    logits,
    refused,
    rewritten,
    save_base,
    train_adapter,
)
from tests.unlearning.helpers import build_tiny_llama
from unlearning import InputError
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.checkpoints.lora import ALL_LINEAR, add_adapter, save_adapter


@pytest.mark.parametrize("architecture", BUILDERS)
def test_a_new_adapter_changes_no_logit_and_is_all_that_trains(architecture: str) -> None:
    model, plain = BUILDERS[architecture](), BUILDERS[architecture]()
    add_adapter(model, rank=4, alpha=8)
    assert type(model) is type(plain), "the class stays, and with it the forward's signature"
    assert torch.equal(logits(model), logits(plain))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    adapted = {name.split(".lora_")[0] for name in trained}
    matrices = {
        name
        for name, module in plain.named_modules()
        if getattr(module, "weight", None) is not None
        and module.weight.dim() == 2
        and not isinstance(module, torch.nn.Embedding)
        and module is not plain.get_output_embeddings()
    }
    assert adapted == matrices, "every linear layer but the output embedding"


def test_an_expression_chooses_modules_and_the_seed_the_start() -> None:
    def starts(seed: int) -> dict[str, Tensor]:
        model = build_tiny_llama()
        state = torch.get_rng_state()
        add_adapter(model, rank=2, alpha=4, targets=r".*layers\.1\..*(down|up)_proj", seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "nobody else's random numbers are drawn"
        return {name: weight.clone() for name, weight in model.named_parameters() if "lora_A" in name}

    first, again, other = starts(0), starts(0), starts(1)
    assert {name.split(".lora_A")[0] for name in first} == {
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
    }
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("targets", [ALL_LINEAR, r".*(q|up)_proj"])
def test_an_adapter_s_modules_are_written_in_order(tmp_path: Path, targets: str) -> None:
    model = build_tiny_llama()
    add_adapter(model, rank=2, alpha=4, targets=targets)
    save_adapter(model, tmp_path)
    modules = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert modules == sorted(adapted)


@pytest.mark.parametrize("targets", ["q_prj", ".*(", r".*layernorm", "q_proj", r"([\w.]+)+!", "(?R)"])
def test_an_expression_that_cannot_be_adapted_is_refused(targets: str) -> None:
    with pytest.raises(InputError) as error:
        add_adapter(build_tiny_llama(), rank=2, alpha=4, targets=targets)
    assert "`lora_targets`" in str(error.value) and repr(targets) in str(error.value)
    assert "\n" not in str(error.value)
    example = re.search(r"such as (.*)$", str(error.value))
    assert example
    add_adapter(build_tiny_llama(), rank=2, alpha=4, targets=example.group(1))


@pytest.mark.parametrize("architecture", BUILDERS)
def test_a_saved_adapter_loads_merged(architecture: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", BUILDERS[architecture])
    trained = train_adapter(tmp_path / "adapter", base)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}

    merged = load_weights(tmp_path / "adapter")
    plain = BUILDERS[architecture]()
    assert type(merged) is type(plain) and not merged.training
    assert all(weight.requires_grad for weight in merged.parameters())
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert (logits(merged) - logits(plain)).abs().max() > 0.05
    torch.testing.assert_close(logits(merged), logits(trained), rtol=1e-4, atol=1e-5)

    theirs = PeftModel.from_pretrained(BUILDERS[architecture](), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(merged), logits(theirs), rtol=1e-4, atol=1e-5)
    of_peft = theirs.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert torch.equal(weight, of_peft[name]), name


def test_merging_adds_the_scaled_product(pair: tuple[Path, Path]) -> None:
    """W + (alpha / rank) B A by hand, from the files."""
    base, adapter = pair
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    merged = load_weights(adapter).state_dict()
    n_adapted = 0
    for name, weight in weights.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in factors:
            n_adapted += 1
            weight = weight + 8 / 4 * factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"]
        torch.testing.assert_close(merged[name], weight, rtol=1e-6, atol=1e-7)
    assert n_adapted == 14


def test_an_adapter_that_peft_made_and_saved_loads_too(tmp_path: Path) -> None:
    """With another kind of adapter (DoRA), which also scales columns, and a whole module trained beside it."""
    base = save_base(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True, modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    model.eval().save_pretrained(tmp_path / "dora")
    torch.testing.assert_close(logits(load_weights(tmp_path / "dora")), logits(model), rtol=1e-4, atol=1e-4)


def test_an_adapter_on_an_adapter_and_a_built_in_base(tmp_path: Path) -> None:
    first = train_adapter(tmp_path / "first", "demo:base", rank=2, alpha=4, targets=r".*\.q_proj")
    assert json.loads((tmp_path / "first/adapter_config.json").read_text())["base_model_name_or_path"] == "demo:base"
    torch.testing.assert_close(logits(load_weights(tmp_path / "first")), logits(first), rtol=1e-4, atol=1e-4)
    second = train_adapter(tmp_path / "second", tmp_path / "first", rank=2, alpha=4, targets=r".*\.v_proj")
    torch.testing.assert_close(logits(load_weights(tmp_path / "second")), logits(second), rtol=1e-4, atol=1e-4)
    assert load_tokenizer(tmp_path / "second").get_vocab() == load_tokenizer(locate_checkpoint("demo:base")).get_vocab()


def test_a_base_whose_weights_changed_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = copied(pair[0], tmp_path / "base"), copied(pair[1], tmp_path / "adapter")
    rewritten(adapter, base_model_name_or_path=str(base))
    known = content_hash(build_tiny_llama(), name="base")
    (adapter / "unlearning.json").write_text(json.dumps({"base_weights": known}))
    assert content_hash(load_weights(adapter), name="merged") != known
    build_tiny_llama(seed=1).save_pretrained(base)
    assert refused(adapter).startswith(f"{adapter}: ") and str(base) in refused(adapter)


def wider() -> PreTrainedModel:
    config = build_tiny_llama().config
    config.intermediate_size = 96
    return LlamaForCausalLM(config)


def shallower() -> PreTrainedModel:
    config = build_tiny_llama().config
    config.num_hidden_layers = 1
    return LlamaForCausalLM(config)


def deeper() -> PreTrainedModel:
    config = build_tiny_llama().config
    config.num_hidden_layers = 3
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("builder", "phrase"),
    [
        (wider, r"size mismatch for .*mlp.* torch.Size\(\[64, 4\]\) .* torch.Size\(\[96, 4\]\)"),
        (shallower, r"0 tensors are missing and 14 are .*layers\.1\."),
        (deeper, r"14 tensors are missing and 0 are .*layers\.2\."),
        (build_gpt2, r"Target modules .*not found"),
    ],
    ids=["wider", "shallower", "deeper", "gpt2"],
)
def test_a_base_of_other_shapes_is_refused(
    builder: Callable[[], PreTrainedModel], phrase: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other, adapter = save_base(tmp_path / "other", builder), copied(pair[1], tmp_path / "adapter")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rewritten(adapter, base_model_name_or_path=str(other), target_modules=modules)
    message = refused(adapter)
    assert message.startswith(f"{adapter}: does not fit its base {other}: ")
    assert re.search(phrase, message), message
    assert "; name the base that it was trained on, or copy " in message


def test_without_peft_the_command_to_install_it_is_given(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unlearning.checkpoints.lora.find_spec", lambda _: None)
    assert "pip install 'dissect-unlearning[lora]'" in refused(pair[1])
    with pytest.raises(InputError, match="adapters need peft"):
        add_adapter(build_tiny_llama(), rank=2, alpha=4)
