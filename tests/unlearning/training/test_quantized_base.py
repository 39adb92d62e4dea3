"""A frozen base in 8 or 4 bit: its values, the training of an adapter on it, and the model that is loaded again."""

import copy
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from tests.unlearning.helpers import build_examples
from unlearning import InputError, train
from unlearning.checkpoints import quantized_base
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.lora import add_adapter
from unlearning.checkpoints.quantized_base import Bits, n_bytes, n_parameters, quantize_base, round_to_bits
from unlearning.options import TrainOptions
from unlearning.training.arguments import state_line

CPU = torch.device("cpu")
BITS: list[Bits] = [4, 8]
TOKENS = torch.tensor([[5, 17, 300, 2, 9], [44, 45, 46, 0, 1]])
SHARED: dict[str, Any] = {
    "forget": build_examples()[:4],
    "retain": build_examples()[4:],
    "lora_rank": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "warmup_ratio": 0,
    "max_steps": 4,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def build_llama(**fields: Any) -> LlamaForCausalLM:
    """Rows of one block and of two."""
    torch.manual_seed(0)
    config = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2, **SIZES}
    return LlamaForCausalLM(LlamaConfig(**config, **fields)).eval()


def build_gpt2() -> GPT2LMHeadModel:
    """Weights that are stored transposed, biases, and tied embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=128, eos_token_id=0, initializer_range=0.2
    )
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {"llama": build_llama, "gpt-2": build_gpt2}


def saved(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def llama(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return saved(build_llama(), tokenizer, tmp_path / "base")


# QLoRA 2305.14314, appendix E.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def plainly(weight: Tensor, bits: Bits) -> Tensor:
    """The nearest values of [out, in] weights, without the rounding of 4-bit scales."""
    if bits == 8:
        step = weight.abs().amax(1, keepdim=True) / 127
        return (weight / step).round() * step
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - NF4).abs().argmin(-1)
    return (NF4[nearest] * scale).reshape(weight.shape)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", BUILDERS)
def test_weights_take_the_nearest_values(name: str, bits: Bits) -> None:
    """Against the papers' formulas; the scales of 4 bit are off by what their own 8 bit lack."""
    model, start = BUILDERS[name](), BUILDERS[name]()
    round_to_bits(model, bits)
    old = dict(start.named_parameters())
    changed = []
    for key, parameter in model.named_parameters():
        if torch.equal(parameter, old[key]):
            continue
        changed.append(key)
        turn = (lambda matrix: matrix.T) if name == "gpt-2" else (lambda matrix: matrix)
        found, wanted = turn(parameter.detach()), plainly(turn(old[key].detach()).contiguous(), bits)
        allowed = 0.02 * float(wanted.abs().max()) if bits == 4 else 1e-6
        assert (found - wanted).abs().max() < allowed, key
        if bits == 4:
            assert (found - wanted).abs().mean() < 0.01 * wanted.abs().mean(), key
    maps = {"llama": "_proj.weight", "gpt-2": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}[name]
    assert sorted(changed) == sorted(key for key in old if key.endswith(maps))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_quantized_map_multiplies_with_these_values(name: str, bits: Bits) -> None:
    """Outputs and gradients, also of the copy that a live reference is."""
    rounded, quantized = BUILDERS[name](), BUILDERS[name]()
    round_to_bits(rounded, bits)
    line = quantize_base(quantized, bits, device=CPU, compute=torch.float32)
    n_maps = {"llama": 14, "gpt-2": 8}[name]
    assert line == f"base: {n_maps} of {n_maps} linear maps in {bits} bit"

    def computed(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embedded)[0]

    wanted = computed(rounded)
    for model in (quantized, copy.deepcopy(quantized)):
        for one, other in zip(computed(model), wanted, strict=True):
            assert (one - other).norm() < 1e-5 * other.norm()
    assert n_parameters(quantized) == rounded.num_parameters()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", BUILDERS)
def test_a_saved_adapter_gives_the_trained_model(name: str, bits: Bits, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The merge is into the rounded base: into the base as it is, it would be another model."""
    base, out = saved(BUILDERS[name](), tokenizer, tmp_path / "base"), tmp_path / "out"
    result = train("npo", model=base, output_dir=out, base_bits=bits, **SHARED)
    loaded = load_weights(out)
    with torch.no_grad():
        trained = result.model(TOKENS).logits
        torch.testing.assert_close(loaded(TOKENS).logits, trained, rtol=1e-4, atol=1e-4)
        record = json.loads((out / "unlearning.json").read_text())
        assert record["base_bits"] == bits
        (out / "unlearning.json").write_text(json.dumps({**record, "base_bits": None}))
        assert (load_weights(out)(TOKENS).logits - trained).abs().max() > 0.01
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert f"in {bits} bit" in (out / "README.md").read_text()
    (out / "unlearning.json").write_text(json.dumps({**record, "base_bits": 3}))
    with pytest.raises(InputError, match="base_bits must be 4 or 8, got 3"):
        load_weights(out)


@pytest.mark.parametrize("bits", BITS)
def test_the_reference_is_the_quantized_base(bits: Bits, llama: Path) -> None:
    """Before the first step model and reference are equal, whatever the cache holds of the base as it is."""
    train("npo", model=llama, retain_loss="kl", **SHARED)
    found = train("npo", model=llama, retain_loss="kl", base_bits=bits, **SHARED)
    assert found.history[0]["forget_loss"] == pytest.approx(2 / 0.1 * torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert found.history[0]["retain_loss"] == pytest.approx(0, abs=1e-6)
    live = train("npo", model=llama, retain_loss="kl", base_bits=bits, reference_budget=0, **SHARED)
    for line, other in zip(live.history, found.history, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_training_is_that_of_the_rounded_base(bits: Bits, llama: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Against an adapter on a plain float32 model with the same values."""
    rounded = build_llama()
    round_to_bits(rounded, bits)
    plain = train("grad_diff", model=saved(rounded, tokenizer, tmp_path / "rounded"), **SHARED)
    found = train("grad_diff", model=llama, base_bits=bits, **SHARED)
    checkpointed = train("grad_diff", model=llama, base_bits=bits, gradient_checkpointing=True, **SHARED)
    for line, other, third in zip(found.history, plain.history, checkpointed.history, strict=True):
        assert line == pytest.approx(other, rel=1e-4)
        assert line == pytest.approx(third, rel=1e-6)
    assert found.history[-1]["forget_loss"] != pytest.approx(found.history[0]["forget_loss"], rel=0.01)


@pytest.mark.parametrize("precision", ["bf16_mixed", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_half_precision_is_near_float32(bits: Bits, precision: str, llama: Path, tmp_path: Path) -> None:
    exact = train("npo", model=llama, base_bits=bits, **SHARED)
    found = train("npo", model=llama, base_bits=bits, precision=precision, output_dir=tmp_path / "out", **SHARED)
    for line, other in zip(found.history, exact.history, strict=True):
        assert line["loss"] != other["loss"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)
    wide = torch.float32 if precision == "bf16_mixed" else torch.bfloat16
    trained = {p.dtype for p in found.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert {p.dtype for p in found.model.parameters()} == {
        torch.float32,
        wide,
        torch.uint8 if bits == 4 else torch.int8,
    }
    with torch.no_grad():
        loaded, logits = load_weights(tmp_path / "out")(TOKENS).logits, found.model(TOKENS).logits.float()
    assert (loaded - logits).norm() < 0.03 * loaded.norm()


@pytest.mark.parametrize("bits", BITS)
def test_the_memory_of_the_frozen_base_is_said(bits: Bits) -> None:
    model = build_llama()
    maps = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    rows = sum(len(p) for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    rest = model.num_parameters() - maps
    quantize_base(model, bits, device=CPU, compute=torch.float32)
    # In 4 bit a byte for a block of 64, and 4 for 256 blocks or what is left of them; in 8 bit 4 for a row.
    sizes = [p.numel() for name, p in build_llama().named_parameters() if name.endswith("_proj.weight")]
    groups = sum(math.ceil(size / 64 / 256) for size in sizes)
    frozen = 4 * rest + (maps // 2 + maps // 64 + 4 * groups if bits == 4 else maps + 4 * rows)
    assert n_bytes(model) == frozen
    add_adapter(model, rank=2, alpha=4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = state_line(model, TrainOptions(lora_rank=2, base_bits=bits))
    assert "4 weights + 4 gradients + 8 moments = 16 bytes per trained parameter" in line
    assert f"({trained / 1e6:.3g} of {(maps + rest + trained) / 1e6:.3g} million)" in line
    assert f"{(frozen + 16 * trained) / 1e9:.3g} GB" in line
    assert line.endswith(f"{frozen / (maps + rest):.3g} bytes per parameter")


def test_rows_that_are_no_whole_blocks_stay_as_they_are() -> None:
    model = build_llama()
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64, bias=False)
    line = quantize_base(model, 4, device=CPU, compute=torch.float32)
    assert line == "base: 13 of 14 linear maps in 4 bit; the rows of the others are no multiples of 64"
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.float32


def test_a_kernel_that_gives_other_values_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of bitsandbytes 0.50 on a CPU with AVX-512, for rows of 96 numbers."""
    values = quantized_base._values
    monkeypatch.setattr(quantized_base, "_values", lambda layer: values(layer).roll(64))
    with pytest.raises(
        InputError, match=r"`base_bits` 4 is not supported.*layers.0.self_attn.q_proj. Set `base_bits` 8"
    ):
        train("npo", model=llama, base_bits=4, **SHARED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_bits": 3}, "`base_bits` must be 4, 8 or none, got 3"),
        ({"base_bits": "sixteen"}, "`base_bits` must be 4, 8 or none, got 'sixteen'"),
        ({"base_bits": 4, "lora_rank": 0}, "`base_bits` has no effect unless lora_rank is above 0, got 4. Remove it."),
        ({"optimizer": "paged_adamw"}, "`optimizer` paged_adamw needs a CUDA device"),
        ({"optimizer": "paged_adamw_8bit"}, "`optimizer` paged_adamw_8bit needs a CUDA device"),
    ],
    ids=str,
)
def test_what_does_not_run_is_refused_before_a_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        train("npo", model="no such model is needed", **{**SHARED, **options})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bits_are_read_from_a_text(llama: Path) -> None:
    found = train("npo", model=llama, base_bits="8", **{**SHARED, "max_steps": 1})
    assert found.options["base_bits"] == 8


def test_a_method_that_reads_gradients_of_the_base_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match="`base_bits` is not supported by sure.*set `salient`"):
        train("sure", model=llama, base_bits=8, **SHARED)
    assert train("sure", model=llama, base_bits=8, salient="q_proj", **SHARED).history


def test_a_sharded_base_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="`base_bits` is not supported under FSDP.*Use DDP"):
        train("npo", model=llama, base_bits=8, **SHARED)


def test_without_bitsandbytes_the_command_to_install_it_is_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(InputError, match="`base_bits` 4 needs bitsandbytes. Run: pip install bitsandbytes"):
        train("npo", model=llama, base_bits=4, **SHARED)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    for name in ("adamw_8bit", "paged_adamw", "paged_adamw_8bit"):
        with pytest.raises(InputError, match=f"`optimizer` {name} needs bitsandbytes. Run: pip install bitsandbytes"):
            train("npo", model=llama, optimizer=name, **SHARED)


def test_a_rate_is_searched_with_quantized_copies(llama: Path, tmp_path: Path) -> None:
    """The trials leave the base as it is, from whose float32 weights the run's own is made."""
    settings = {**SHARED, "learning_rate": None, "output_dir": tmp_path / "out", "precision": "bfloat16"}
    found = train("npo", model=llama, base_bits=4, tune=True, **settings)
    assert json.loads((tmp_path / "out" / "tuning.json").read_text())["trials"]
    with torch.no_grad():
        loaded, logits = load_weights(tmp_path / "out")(TOKENS).logits, found.model(TOKENS).logits.float()
    assert (loaded - logits).norm() < 0.03 * loaded.norm()
