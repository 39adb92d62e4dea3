import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dissect import InputError
from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.models.pair import ModelPair
from dissect.stress.core.case import Case
from dissect.stress.quantisation import SCHEMES, quantisation, quantise, quantised_model, same_codes
from tests.dissect.stress.constructed import case_of, model

N = 8

# 4-bit books, written down from the sources and not read from the library: the quantiles of NF4 (2305.14314,
# appendix E), and FP4 with a sign, two bits of exponent and one of mantissa, over its largest value 12.
NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 2, 3, 4, 6, 8, 12)]


def _slowly(weight, scheme):
    """Round to nearest, number by number; and how near each one lies to a tie, in units of the largest number."""
    weight = weight.double().numpy()
    blocks = weight.astype(np.float16).astype(float) if scheme == "int8" else weight.reshape(-1)
    book = {"int8": [code / 127 for code in range(-127, 128)], "nf4": NF4, "fp4": FP4}[scheme]
    size = blocks.shape[1] if scheme == "int8" else 64
    blocks = blocks.reshape(-1)
    codes, values, ties = np.empty_like(blocks), np.empty_like(blocks), np.empty_like(blocks)
    for first in range(0, len(blocks), size):
        largest = max(abs(number) for number in blocks[first : first + size])
        for place in range(first, min(first + size, len(blocks))):
            here = blocks[place] / largest if largest else 0.0
            nearest = sorted(set(book), key=lambda entry: abs(entry - here))
            codes[place], values[place] = nearest[0], nearest[0] * largest
            ties[place] = abs(abs(nearest[1] - here) - abs(nearest[0] - here))
    return codes.reshape(weight.shape), values.reshape(weight.shape), ties.reshape(weight.shape)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(4, 128), (12, 32), (5, 27)])  # rows of whole blocks, of parts, and of odd length
def test_weights_are_rounded_to_the_nearest_code(scheme, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    found = quantise(weight, scheme)
    codes, values, ties = _slowly(weight, scheme)
    clear = ties > 1e-3  # the library's thresholds between codes are written with four or five digits
    assert clear.mean() > 0.8
    np.testing.assert_allclose(found.codes.numpy()[clear], codes[clear], atol=1e-4)
    np.testing.assert_allclose(found.values.numpy()[clear], values[clear], atol=2e-5)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from(SCHEMES), st.integers(0, 99), st.floats(1e-3, 30))
def test_rounding_twice_is_rounding_once(rows, columns, scheme, seed, scale):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    once = quantise(weight, scheme)
    twice = quantise(once.values, scheme)
    assert once.codes.shape == once.values.shape == weight.shape
    torch.testing.assert_close(twice.codes, once.codes, rtol=0, atol=0)
    torch.testing.assert_close(twice.values, once.values, rtol=2e-7, atol=0)


def test_all_linear_weights_but_the_heads_are_rounded_and_nothing_else():
    before = model("demo:npo")
    kept = {name: value.clone() for name, value in before.hf.named_parameters()}
    after = quantised_model(before, "nf4")
    head = before.hf.get_output_embeddings()
    linear = {f"{path}.weight" for path, m in before.hf.named_modules() if isinstance(m, nn.Linear) and m is not head}
    changed = {name for name, value in after.hf.named_parameters() if not torch.equal(value, kept[name])}
    assert changed == linear and len(linear) == 7 * before.n_layers
    assert all(torch.equal(value, kept[name]) for name, value in before.hf.named_parameters())
    assert after.sha256 != before.sha256


def test_outputs_are_rows_in_conv1d_too():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=1000, n_positions=32)
    torch.manual_seed(0)
    gpt2 = Model.wrap(GPT2LMHeadModel(config), model("demo:base").tokenizer, name="gpt2")
    after = quantised_model(gpt2, "int8").hf
    module = gpt2.hf.transformer.h[0].mlp.c_fc
    assert isinstance(module, Conv1D)
    of_module = after.transformer.h[0].mlp.c_fc.weight
    torch.testing.assert_close(of_module.T, quantise(module.weight.detach().T, "int8").values)
    assert all(len(column.unique()) <= 255 for column in of_module.T)
    assert after.lm_head.weight is after.transformer.wte.weight


@pytest.mark.parametrize("name", ["demo:base", pytest.param("demo-neox:base", marks=pytest.mark.slow)])
def test_the_base_as_unlearned_has_the_same_codes_and_all_of_its_knowledge(name):
    result = quantisation(case_of(model(name), base=name, n=N), schemes=("nf4",))
    codes = result.tables["codes"].set_index("role")
    assert codes.loc["unlearned", "same_code"] == 1 > codes.loc["control", "same_code"]
    assert result.residual().rho > 0.9
    assert result.level == 4 and result.residual().variant == "nf4"


def test_the_never_model_as_unlearned_has_no_residual():
    found = quantisation(case_of(model("demo:never"), n=N), schemes=("fp4",)).residual()
    assert found.rho == found.low == found.high == 0


def test_a_change_below_the_rounding_step_is_undone():
    """The base with every linear weight moved by a tenth of the distance to the next code at most: rounded, it is the
    rounded base, number for number."""
    base = quantised_model(model("demo:base"), "nf4")
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, weight in base.hf.named_parameters():
        if "proj" in name:
            blocks = weight.detach().reshape(-1, 64)
            largest = blocks.abs().amax(1, keepdim=True)
            step = 0.1 * 0.0796 * largest * (2 * torch.rand(blocks.shape, generator=generator) - 1)
            step = torch.where(blocks.abs() == largest, 0.0, step)  # these make the scale of their blocks
            moved[name] = (blocks + step).view_as(weight)
    hidden = Model.wrap(with_values(base.hf, moved), base.tokenizer, name="moved")
    assert same_codes(base, hidden, "nf4") == (sum(m.numel() for m in moved.values()),) * 2
    again = quantised_model(hidden, "nf4")
    for name in moved:
        torch.testing.assert_close(again.hf.get_parameter(name), base.hf.get_parameter(name), rtol=2e-7, atol=0)


def test_without_a_never_model_there_is_a_residual_against_the_floor():
    case = case_of(model("demo:npo"), n=N)
    alone = Case(ModelPair(case.pair.base, case.pair.unlearned), None, case.forget)
    result = quantisation(alone, schemes=("nf4",))
    assert set(result.frame["role"]) == {"base", "unlearned"}
    assert result.residual().against == "floor" and result.residual().rho is not None


@pytest.mark.parametrize("schemes", [(), ("int4",)])
def test_unknown_schemes_are_refused(schemes):
    with pytest.raises(InputError, match="schemes.*int8, nf4, fp4"):
        quantisation(case_of(model("demo:npo"), n=N), schemes=schemes)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="pip install"):
        quantisation(case_of(model("demo:npo"), n=N))
