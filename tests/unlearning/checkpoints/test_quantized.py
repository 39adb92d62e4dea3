"""Quantized weights: dequantized like the files say, or refused; integers are never taken for weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from dissect.models.model import Model, load_model
from tests.dissect.families import build
from tests.unlearning.checkpoints.adapters import copied, logits, refused, save_base
from tests.unlearning.helpers import build_tiny_llama
from unlearning import train
from unlearning.checkpoints.load import load_weights
from unlearning.common.errors import InputError
from unlearning.evaluation.subject import Subject

Tensors = dict[str, Tensor]
BLOCK = 16


def is_matrix(name: str, tensor: Tensor) -> bool:
    return ".layers." in name and tensor.dim() == 2


def to_int8(tensors: Tensors) -> Tensors:
    scales = {name: tensor.abs().amax(1, keepdim=True) / 127 for name, tensor in tensors.items() if tensor.dim() == 2}
    return {
        name: (tensor / scales[name]).round().to(torch.int8) if is_matrix(name, tensor) else tensor
        for name, tensor in tensors.items()
    }


def with_scales(tensors: Tensors) -> Tensors:
    matrices = {name: tensor for name, tensor in tensors.items() if is_matrix(name, tensor)}
    return to_int8(tensors) | {f"{name}_scale": tensor.abs().amax(1) / 127 for name, tensor in matrices.items()}


def only_scales(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(64)}


def to_fp8(tensors: Tensors) -> Tensors:
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if is_matrix(name, tensor):
            rows, columns = tensor.shape
            blocks = tensor.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            stored[name] = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
    return stored


def from_fp8(stored: Tensors) -> Tensors:
    """Multiply every block by its scale."""
    plain = {}
    for name, tensor in stored.items():
        if f"{name}_scale_inv" in stored:
            scales = stored[f"{name}_scale_inv"]
            plain[name] = tensor.float() * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    return plain


def from_8bit(stored: Tensors) -> Tensors:
    """Multiply every row by its largest value over 127, as bitsandbytes stores them."""
    plain = {}
    for name, tensor in stored.items():
        row = stored.get(f"{name.removesuffix('weight')}SCB")
        if row is not None and name.endswith(".weight"):
            plain[name] = tensor.float() * row[:, None] / 127
        elif not name.endswith(("SCB", "weight_format")):
            plain[name] = tensor
    return plain


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Magnitudes of a 4-bit float; the highest of its four bits is the sign."""


def to_mxfp4(tensors: Tensors) -> Tensors:
    """Stack the experts' matrices by output rows, in blocks of 32 numbers of 4 bits with one power of two each."""
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del stored[name]
            rows = tensor.transpose(1, 2)
            blocks = rows.reshape(*rows.shape[:2], -1, 32)
            exponents = (blocks.abs().amax(-1).clamp(min=2**-100) / 6).log2().ceil()
            scaled = blocks / 2 ** exponents[..., None]
            code = (scaled.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (scaled < 0)
            stored[f"{name}_blocks"] = (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)
            stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    return stored


def from_mxfp4(stored: Tensors) -> Tensors:
    """Look every nibble up, the lower one first, and multiply it by its block's power of two."""
    values = torch.cat([FP4, -FP4])
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            codes = torch.stack([tensor % 16, tensor // 16], -1).flatten(-2).long()
            powers = 2.0 ** (stored[f"{name.removesuffix('_blocks')}_scales"].float() - 127)
            plain[name.removesuffix("_blocks")] = (values[codes] * powers[..., None]).flatten(2).transpose(1, 2)
        elif not name.endswith("_scales"):
            plain[name] = tensor
    return plain


def build_gpt_oss() -> PreTrainedModel:
    return build("gpt-oss", intermediate_size=64)  # whole blocks of 32


def changed(path: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Rewrite the tensors of a checkpoint, and fields of its configuration."""
    tensors = change(load_file(path / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    stated = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(stated | config))
    return path


def plain_logits(tensors: Tensors) -> Tensor:
    model = build_tiny_llama()
    model.load_state_dict(tensors)
    return logits(model)


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """The tiny Llama as bitsandbytes saves it in 8 and in 4 bits, each with a tokenizer."""
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("quantized")
    base = save_base(root / "base")
    settings = {
        "8bit": BitsAndBytesConfig(load_in_8bit=True),
        "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    }
    for name, config in settings.items():
        model = AutoModelForCausalLM.from_pretrained(
            base, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in (*settings, "base")}


def test_8_bits_are_what_the_files_say_also_after_the_sites_were_checked(quantized: dict[str, Path]) -> None:
    wanted = plain_logits(from_8bit(load_file(quantized["8bit"] / "model.safetensors")))
    with pytest.warns(UserWarning, match=r"quantized \(bitsandbytes\); they were dequantized"):
        model = load_model(quantized["8bit"], device="cpu")
    torch.testing.assert_close(logits(model.hf), wanted, atol=1e-4, rtol=1e-4)
    assert model.missing_sites == {}
    assert {type(module) for module in model.hf.modules()} == {type(module) for module in build_tiny_llama().modules()}
    # The original, for scale: 8 bits change something, but little.
    original = logits(build_tiny_llama())
    assert 0 < (logits(model.hf) - original).abs().max() < 0.05 * original.abs().max()


def test_4_bits_are_what_bitsandbytes_makes_of_them(quantized: dict[str, Path]) -> None:
    """Blocks of 64 weights go over the ends of rows of 32: only as one row they are read right on every CPU."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tensors = dict(build_tiny_llama().state_dict())
    for name, tensor in tensors.items():
        if is_matrix(name, tensor):
            packed, state = quantize_4bit(tensor.flatten(), quant_type="nf4", compress_statistics=True)
            tensors[name] = dequantize_4bit(packed, state).reshape(tensor.shape)
            # Of normal weights nf4 loses 9 %, whatever the shape; with scales of other blocks it would be 18 to 42 %.
            assert 0.07 < (tensors[name] - tensor).norm() / tensor.norm() < 0.11, name
    with pytest.warns(UserWarning, match="dequantized"):
        model = load_weights(quantized["4bit"])
    torch.testing.assert_close(logits(model), plain_logits(tensors), atol=1e-4, rtol=1e-4)


def test_8_bit_floats_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    path = changed(save_base(tmp_path / "fp8"), to_fp8, **FP8)
    with pytest.warns(UserWarning, match=r"quantized \(fp8\); they were dequantized"):
        model = load_weights(path, dtype=torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load_weights(tmp_path / "plain", dtype=torch.float64)), logits(model))
    wanted = plain_logits(from_fp8(load_file(path / "model.safetensors")))
    torch.testing.assert_close(logits(model).float(), wanted, atol=1e-4, rtol=1e-4)


MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_4_bit_floats_of_experts_are_multiplied_by_the_power_of_two_of_their_block(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = changed(save_base(tmp_path / "mxfp4", build_gpt_oss), to_mxfp4, **MXFP4)
    stored = load_file(path / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (4, 128, 1, 16)
    assert stored["model.layers.0.mlp.experts.down_proj_blocks"].shape == (4, 32, 2, 16)
    with pytest.warns(UserWarning, match=r"quantized \(mxfp4\); they were dequantized"):
        loaded = load_weights(path, dtype=dtype)
    wanted, found = from_mxfp4(stored), loaded.state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.to(dtype)), name
    oracle = build_gpt_oss()
    original = logits(oracle)
    oracle.load_state_dict(wanted)
    torch.testing.assert_close(logits(loaded).float(), logits(oracle), atol=1e-4, rtol=1e-4)
    # The original, for scale: 4 bits change something, but not everything.
    assert 0 < (logits(oracle) - original).std() < 0.5 * original.std()


@pytest.mark.filterwarnings("ignore:.*dequantized")
def test_a_mixture_of_4_bit_floats_is_a_model_as_any_other(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = changed(save_base(tmp_path / "mxfp4", build_gpt_oss), to_mxfp4, **MXFP4)
    tokenizer.save_pretrained(path)
    model = load_model(path, device="cpu")
    assert "mlp_out" not in model.missing_sites
    model.hf.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load_weights(tmp_path / "plain")), logits(model.hf))
    with pytest.raises(InputError, match="cannot be streamed: its weights are quantized"):
        load_model(path, device="cpu", stream=True)


@pytest.mark.parametrize(
    ("change", "config", "phrase"),
    [
        (
            to_mxfp4,
            {},
            r"its weights are quantized \(model\.layers\.0\.\S+_blocks\), and its configuration does not say",
        ),
        (dict, MXFP4, r"quantized \(mxfp4\), and none is"),
        (
            lambda tensors: {k: t for k, t in to_mxfp4(tensors).items() if "1.mlp.experts.down_proj_s" not in k},
            MXFP4,
            r"model\.layers\.1\.mlp\.experts\.down_proj_blocks has no scales",
        ),
        (
            lambda tensors: {k: t[..., :8] if "_blocks" in k else t for k, t in to_mxfp4(tensors).items()},
            MXFP4,
            "down_proj has shape",
        ),
    ],
    ids=["not stated", "stated and plain", "no scales", "half a block"],
)
def test_broken_4_bit_floats_are_refused_in_one_line(
    change: Callable[[Tensors], Tensors], config: dict[str, Any], phrase: str, tmp_path: Path
) -> None:
    path = changed(save_base(tmp_path / "mxfp4", build_gpt_oss), change, **config)
    with pytest.raises(InputError, match=phrase) as error:
        load_weights(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*dequantized")
def test_a_dequantized_model_trains_and_saves_as_any_other(quantized: dict[str, Path], tmp_path: Path) -> None:
    from tests.unlearning.helpers import build_examples

    forget = build_examples(4)
    trained = train(
        "ga", model=quantized["8bit"], forget=forget, max_steps=1, output_dir=tmp_path / "out", progress=False
    )
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(logits(load_weights(tmp_path / "out")), logits(trained.model))


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (to_int8, r"14 of its weights are stored as integers or 8-bit floats \(model\.layers\.0\.\S+: I8\)"),
        (with_scales, r"its weights are quantized \(model\.layers\.0\.\S+_scale\), and its configuration does not say"),
        (only_scales, r"its weights are quantized \(model\.layers\.0\.mlp\.up_proj\.weight_scale\)"),
        (to_fp8, "its weights are quantized"),
        (lambda tensors: {**tensors, "model.norm.weight": torch.ones(32, dtype=torch.int64)}, "norm.weight: I64"),
        (lambda tensors: {**tensors, "lm_head.weight": tensors["lm_head.weight"] > 0}, "lm_head.weight: BOOL"),
    ],
    ids=["int8", "int8 with scales", "only scales", "fp8", "int64", "bool"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_integers_are_not_taken_for_weights(
    change: Callable[[Tensors], Tensors],
    phrase: str,
    stream: bool,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = changed(save_base(tmp_path / "broken"), change)
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match=phrase) as error:
        load_model(path, device="cpu", stream=stream)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_pickled_integers_are_not_taken_for_weights_either(tmp_path: Path) -> None:
    path = save_base(tmp_path / "pickled")
    torch.save(to_int8(load_file(path / "model.safetensors")), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert "14 of its weights are stored as integers" in refused(path, allow_pickle=True)


def test_packed_weights_without_their_configuration_are_refused(quantized: dict[str, Path], tmp_path: Path) -> None:
    for name in ("8bit", "4bit"):
        path = changed(copied(quantized[name], tmp_path / name), dict, quantization_config=None)
        assert "its weights are quantized (" in refused(path)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "no-such-method"])
def test_methods_that_are_not_read_are_refused_by_name(
    method: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = changed(save_base(tmp_path / "model"), dict, quantization_config={"quant_method": method, "bits": 4})
    tokenizer.save_pretrained(path)
    for stream in (False, True):
        with pytest.raises(InputError, match=rf"quantized \({method}\), and cannot be read here") as error:
            load_model(path, device="cpu", stream=stream)
        assert "stream" not in str(error.value)
    with pytest.raises(InputError, match=method):
        train("ga", model=path, forget=[], progress=False)


@pytest.mark.parametrize(
    ("settings", "phrase"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"quantized \(bitsandbytes\), and none is"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantized \(bitsandbytes\), and none is"),
        ({"quant_method": "fp8"}, r"quantized \(fp8\), and none is"),
        ({}, "names no quant_method"),
        ("int8", "names no quant_method"),
        ({"quant_method": 8}, "names no quant_method"),
    ],
)
def test_a_quantization_that_does_not_fit_the_files_is_refused(settings: Any, phrase: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = changed(save_base(tmp_path / "model"), dict, quantization_config=settings)
    with pytest.raises(InputError, match=phrase):
        load_weights(path)


def test_without_bitsandbytes_the_command_to_install_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(save_base(tmp_path / "model"), dict, quantization_config={"quant_method": "bitsandbytes"})
    monkeypatch.setattr("unlearning.checkpoints.locate.find_spec", lambda _: None)
    assert "pip install bitsandbytes" in refused(path)


def test_quantized_weights_are_not_streamed_and_not_spread(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = changed(save_base(tmp_path / "fp8"), to_fp8, **FP8)
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="cannot be streamed: its weights are quantized; turn `stream` off"):
        load_model(path, device="cpu", stream=True)
    assert "`device` must be one device for quantized weights" in refused(path, device="auto")


def test_a_quantized_model_in_memory_is_refused(quantized: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    """Looking at one used to destroy it."""
    loaded = AutoModelForCausalLM.from_pretrained(quantized["8bit"], device_map="cpu", dtype=torch.float32).eval()
    before = logits(loaded)
    for look in (Model.wrap, Subject.wrap):
        with pytest.raises(InputError, match="^mine: the model's weights are quantized"):
            look(loaded, tokenizer, name="mine")
    with pytest.raises(InputError, match="the model's weights are quantized"):
        train("ga", model=loaded, tokenizer=tokenizer, forget=[], progress=False)
    assert torch.equal(logits(loaded), before)


def test_buffers_of_integers_are_no_weights(tmp_path: Path) -> None:
    """Old checkpoints hold masks and positions."""
    path = save_base(tmp_path / "old")
    wanted = logits(load_weights(path))
    changed(path, lambda tensors: {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    changed(path, lambda tensors: {**tensors, "model.layers.0.attn.bias": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.warns(UserWarning, match="tensors of its weights are not part of the model"):
        assert torch.equal(logits(load_weights(path)), wanted)
    shutil.rmtree(path)
