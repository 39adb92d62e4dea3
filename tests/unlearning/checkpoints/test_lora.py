"""Adapters: trained in place, saved as peft's, merged on load; against the formula and against peft itself."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.unlearning.helpers import build_tiny_llama
from unlearning import InputError
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.checkpoints.lora import add_adapter, save_adapter

TOKENS = torch.tensor([[5, 17, 300, 2, 9], [44, 45, 46, 0, 1]])


def build_gpt2() -> GPT2LMHeadModel:
    """Its projections are Conv1D: stored transposed, and tied embeddings."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()


def build_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return GPTNeoXForCausalLM(config).eval()


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "gpt2": build_gpt2,
    "neox": build_neox,
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def save_base(directory: Path, builder: Callable[[], PreTrainedModel] = build_tiny_llama) -> Path:
    builder().save_pretrained(directory)
    return directory


def train_adapter(directory: Path, base: Path | str, **options: Any) -> PreTrainedModel:
    """Train a moment on one line and save the adapter; returns the trained model, still unmerged."""
    model = load_weights(locate_checkpoint(base))
    add_adapter(model, **{"rank": 4, "alpha": 8, "base": str(base), **options})
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model.eval(), directory)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """A base with a tokenizer, and an adapter of it without one."""
    root = tmp_path_factory.mktemp("adapter")
    base = save_base(root / "base")
    tokenizer.save_pretrained(base)
    train_adapter(root / "adapter", base)
    return base, root / "adapter"


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def rewritten(path: Path, **changes: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as error:
        load_weights(Path(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


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


@pytest.mark.parametrize("targets", ["q_prj", ".*(", r".*layernorm", "q_proj"])
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


def test_an_adapter_finds_its_base_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    train_adapter(Path("adapter"), "base")
    monkeypatch.chdir("/")
    assert isinstance(load_weights(tmp_path / "adapter"), LlamaForCausalLM)


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
    assert message.endswith("name the base that it was trained on")


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
    assert "NaNs detected in the merged weights" in refused(nan)

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


def test_a_base_that_is_broken_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = copied(pair[0], tmp_path / "base"), copied(pair[1], tmp_path / "adapter")
    rewritten(adapter, base_model_name_or_path=str(base))
    (base / "model.safetensors").write_bytes(b"short")
    assert f"{base / 'model.safetensors'}: cut short" in refused(adapter)


def test_without_peft_the_command_to_install_it_is_given(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unlearning.checkpoints.lora.find_spec", lambda _: None)
    assert "pip install 'dissect-unlearning[lora]'" in refused(pair[1])
    with pytest.raises(InputError, match="adapters need peft"):
        add_adapter(build_tiny_llama(), rank=2, alpha=4)


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
    with pytest.raises(InputError, match="an adapter cannot be streamed; merge it into its base first"):
        load_model(tmp_path / "adapter", stream=True)
