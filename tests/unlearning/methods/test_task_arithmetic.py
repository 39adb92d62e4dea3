"""Arithmetic on checkpoints: its identities, and what it leaves alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from tests.unlearning.helpers import build_tiny_llama
from unlearning import InputError
from unlearning.methods.task_arithmetic import subtract_task_vector

START, FINETUNED, PRETRAINED = (dict(build_tiny_llama(seed).double().state_dict()) for seed in range(3))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_nothing_subtracted_leaves_the_start() -> None:
    assert distance(subtract_task_vector(START, FINETUNED, PRETRAINED, alpha=0), START) == 0


def test_minus_one_in_muses_form_gives_the_finetuned_model() -> None:
    assert distance(subtract_task_vector(START, FINETUNED, START, alpha=-1), FINETUNED) < 1e-15


def test_ilharcos_form_reads_three_checkpoints() -> None:
    result = subtract_task_vector(START, FINETUNED, PRETRAINED, alpha=0.7)
    for name, tensor in result.items():
        expected = START[name] - 0.7 * (FINETUNED[name] - PRETRAINED[name])
        torch.testing.assert_close(tensor, expected, atol=1e-14, rtol=0)


@given(alpha=st.floats(-16, 16), share=st.floats(0, 1))
@settings(max_examples=15)
def test_the_result_is_linear_in_alpha(alpha: float, share: float) -> None:
    whole = subtract_task_vector(START, FINETUNED, PRETRAINED, alpha)
    part = subtract_task_vector(START, FINETUNED, PRETRAINED, share * alpha)
    between = {name: (1 - share) * START[name] + share * whole[name] for name in START}
    assert distance(part, between) < 1e-12


def test_half_precision_is_computed_in_float32_and_rounded_once() -> None:
    start, finetuned, base = ({"w": torch.tensor([value], dtype=torch.bfloat16)} for value in (1.0, 512.0, 1.0))
    result = subtract_task_vector(start, finetuned, base, alpha=0.5)["w"]
    assert result.dtype == torch.bfloat16
    assert result.item() == -254  # 1 - 0.5 * 511, to even; in bfloat16 throughout, 511 is 512 and this is -255


def test_integer_buffers_are_the_starts() -> None:
    start = {"w": torch.ones(2), "steps": torch.tensor(7), "mask": torch.tensor([True, False])}
    finetuned = {"w": torch.zeros(2), "steps": torch.tensor(9), "mask": torch.tensor([False, False])}
    result = subtract_task_vector(start, finetuned, start, alpha=2.0)
    assert result["steps"] == 7 and result["mask"].tolist() == [True, False]
    assert result["w"].tolist() == [3.0, 3.0]


def test_tied_weights_stay_tied_and_move_once() -> None:
    def build(seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))

    model, other = build(0), build(1)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = subtract_task_vector(model.state_dict(), other.state_dict(), model.state_dict(), alpha=2.0)
    assert result["lm_head.weight"] is result["transformer.wte.weight"]
    model.load_state_dict(result)
    moved = start["lm_head.weight"] - 2 * (other.lm_head.weight - start["lm_head.weight"])
    torch.testing.assert_close(model.lm_head.weight, moved)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_arguments_are_left_as_they_are() -> None:
    before = {name: tensor.clone() for name, tensor in START.items()}
    result = subtract_task_vector(START, FINETUNED, PRETRAINED, alpha=0)
    assert distance(START, before) == 0
    assert not any(result[name].data_ptr() == START[name].data_ptr() for name in START)


@pytest.mark.parametrize(
    ("finetuned", "base", "message"),
    [
        ({"w": torch.ones(2)}, {"w": torch.ones(2)}, "the task vector is zero"),
        ({"v": torch.ones(2)}, {"w": torch.ones(2)}, r"the fine-tuned weights have v, .*\(2 names differ\)"),
        ({"w": torch.zeros(2)}, {}, "the base weights lack w"),
        (
            {"w": torch.zeros(2)},
            {"w": torch.ones(3)},
            r"w has shape \[2\] in the reference model and \[3\] in the base model",
        ),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    finetuned: dict[str, Tensor], base: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        subtract_task_vector({"w": torch.ones(2)}, finetuned, base, alpha=1.0)
