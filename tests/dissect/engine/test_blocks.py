"""A model taken apart at its blocks gives what it gives as a whole, and is put together again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dissect.engine.blocks import block_inputs
from dissect.models.model import Model
from dissect.models.taken_apart import logits_of, replaced_forward
from dissect.prompts.prompts import Batch
from tests.dissect.helpers import (
    build_batch,
    build_model,
    build_tokenizer,
    decoder_blocks,
    plain_inputs,
    torch_state,
)
from unlearning.common.errors import InputError

FAMILIES = ["llama", "mistral", "gpt2", "neox", "gemma2", "opt", "bloom", "falcon", "gptj", "mixtral"]


def wrapped(family: str, **options: Any) -> Model:
    return Model.wrap(build_model(family, **options), build_tokenizer(), name=family)


def repeated(batch: Batch, copies: int) -> dict[str, Tensor]:
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert batch.position_ids is not None
    return {
        name: torch.cat([value] * copies) for name, value in (inputs | {"position_ids": batch.position_ids}).items()
    }


def flat(arguments: Any) -> list[Any]:
    if isinstance(arguments, tuple | list):
        return [leaf for argument in arguments for leaf in flat(argument)]
    if isinstance(arguments, dict):
        return [leaf for name in sorted(arguments) for leaf in (name, *flat(arguments[name]))]
    return [arguments]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_are_called_as_the_model_itself_calls_them(family: str, side: str, tmp_path: Path) -> None:
    """Masks, positions, rotary tables, windows and slopes: for any number of copies of the batch."""
    model, batch = wrapped(family), build_batch(tmp_path, side)
    blocks = decoder_blocks(model.hf)
    ran: list[int] = []
    attention = blocks[0].get_submodule(model.anatomy.attn or "")
    handle = attention.register_forward_pre_hook(lambda *_arguments: ran.append(1))
    inputs = block_inputs(model.hf, model.anatomy, batch)
    handle.remove()
    assert ran == []
    assert len(inputs.arguments_of_one) == len(blocks)
    for copies in (1, 3):
        model_inputs = repeated(batch, copies)
        if not model.takes_position_ids:
            del model_inputs["position_ids"]
        noted: list[tuple[Tensor, Any]] = []

        def note(_block: nn.Module, args: Any, kwargs: Any, noted: list[Any] = noted) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            noted.append((hidden.clone(), (args[1:], kwargs)))

        handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
        model.hf(**model_inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        assert torch.equal(noted[0][0], torch.cat([inputs.hidden] * copies))
        for layer, (_, theirs) in enumerate(noted):
            ours, expected = flat(inputs.arguments(layer, copies)), flat(theirs)
            assert len(ours) == len(expected)
            for mine, other in zip(ours, expected, strict=True):
                if isinstance(other, Tensor):
                    assert torch.equal(mine.expand_as(other), other)
                else:
                    assert mine == other


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_of_final_states_are_the_model_s_own(family: str, tmp_path: Path) -> None:
    """Final norm, head and soft-capping, for any rows and positions in any order."""
    model, batch = wrapped(family), build_batch(tmp_path, "right")
    left: list[Tensor] = []

    def note(_block: nn.Module, _args: Any, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_blocks(model.hf)[-1].register_forward_hook(note)
    whole = model.hf(**plain_inputs(model, batch), use_cache=False).logits
    handle.remove()
    order = torch.randperm(len(batch.rows), generator=torch.Generator().manual_seed(0))
    rows, columns = batch.rows[order], batch.columns[order]
    inputs = block_inputs(model.hf, model.anatomy, batch)
    logits = logits_of(model.hf, model.anatomy, left[0][rows, columns], as_tuple=inputs.as_tuple)
    assert logits.dtype == torch.float32
    assert whole.std() > 0.1
    torch.testing.assert_close(logits, whole[rows, columns], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [("float64", "float64"), ("bfloat16", "float32")])
@torch.no_grad()
def test_logits_are_float32_or_wider(dtype: str, expected: str) -> None:
    model = wrapped("llama", dtype=getattr(torch, dtype))
    states = torch.ones(3, 32, dtype=getattr(torch, dtype))
    logits = logits_of(model.hf, model.anatomy, states, as_tuple=False)
    assert logits.dtype == getattr(torch, expected)
    assert logits.shape == (3, 384)


def test_a_replaced_forward_is_put_back_whatever_happens() -> None:
    module = nn.Linear(2, 2)
    states = torch.ones(1, 2)
    plain = module(states)
    with replaced_forward(module, lambda states: -states):
        assert torch.equal(module(states), -states)
        with replaced_forward(module, lambda states: 2 * states):  # nested, as a block within a model
            assert torch.equal(module(states), 2 * states)
        assert torch.equal(module(states), -states)
    with pytest.raises(KeyError), replaced_forward(module, lambda states: -states):
        raise KeyError
    assert "forward" not in vars(module)
    assert torch.equal(module(states), plain)


def test_a_forward_that_accelerate_put_there_is_put_back() -> None:
    module = nn.Linear(2, 2)

    def theirs(states: Tensor) -> Tensor:
        return 3 * states

    module.forward = theirs  # type: ignore[method-assign]
    with replaced_forward(module, lambda states: -states):
        pass
    assert vars(module)["forward"] is theirs


@torch.no_grad()
def test_a_model_that_does_something_between_its_blocks_is_refused(tmp_path: Path) -> None:
    model, batch = wrapped("llama"), build_batch(tmp_path, "right")
    inner = model.hf.model
    before = torch_state(model)

    def scaling(input_ids: Tensor, **_kwargs: Any) -> Any:
        hidden = inner.embed_tokens(input_ids)
        for block in inner.layers:
            hidden = 1.5 * block(hidden)
        return hidden

    with replaced_forward(inner, scaling), pytest.raises(InputError) as refused:
        block_inputs(model.hf, model.anatomy, batch)
    assert "LlamaForCausalLM" in str(refused.value) and "`engine`" in str(refused.value)
    assert torch_state(model) == before


def test_an_error_before_the_blocks_is_passed_on(tmp_path: Path) -> None:
    model, batch = wrapped("llama"), build_batch(tmp_path, "right")
    before = torch_state(model)

    def fail(*_arguments: Any) -> None:
        raise torch.OutOfMemoryError("no room for the embedding")

    with (
        replaced_forward(model.hf.get_input_embeddings(), fail),
        pytest.raises(torch.OutOfMemoryError, match="no room for the embedding"),
    ):
        block_inputs(model.hf, model.anatomy, batch)
    assert torch_state(model) == before
