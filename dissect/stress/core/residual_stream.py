"""The residual stream at the scored positions: read in one forward, decoded by a head, put into another forward.

States are what blocks hand on, caught by hooks: `output_hidden_states` would give the last one after the final norm,
and a model that is given it back would norm it twice.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dissect.engine.blocks import block_inputs, logits_of
from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompt, Prompts
from dissect.scoring.recovery import answer_logprob, per_example
from unlearning.common.errors import InputError


@dataclass(frozen=True, eq=False)
class Stream:
    """What a model's residual stream holds at a batch's scored positions.

    Attributes:
        states: place 0 is what enters the first block, place l + 1 what block l hands on, before any final norm.
        as_tuple: whether its blocks hand on tuples, which a head of the same architecture has to know.
    """

    states: Float[Tensor, "place scored d_model"]
    as_tuple: bool

    @torch.inference_mode()
    def logits(self, place: int, head: Model) -> Float[Tensor, "scored vocab"]:
        """The states of one place through a model's final norm and head (logit lens), in float32 or wider."""
        return head_logits(head, self.states[place], as_tuple=self.as_tuple)


def head_logits(
    head: Model, states: Float[Tensor, "scored d_model"], *, as_tuple: bool
) -> Float[Tensor, "scored vocab"]:
    """States through a model's final norm, its head and whatever follows that; a gradient goes through."""
    return logits_of(head.hf, head.anatomy, states.to(head.device), as_tuple=as_tuple).to(head.device)


@torch.inference_mode()
def residual_stream(model: Model, batch: Batch) -> Stream:
    """Read the residual stream of every layer in one forward.

    Args:
        model: in memory; hooks that are on it take part.
        batch: its scored positions are read.

    Raises:
        InputError: states that are not finite.
    """
    batch = batch.to(model.device)
    kept: dict[int, Tensor] = {}
    tuples: list[bool] = []

    def scored(states: Tensor) -> Tensor:
        found = states[batch.rows.to(states.device), batch.columns.to(states.device)].to(model.device)
        return found if found.dtype == torch.float64 else found.float()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept[0] = scored(args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Any:
        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            tuples.append(isinstance(output, tuple))
            kept[layer + 1] = scored(output[0] if isinstance(output, tuple) else output)

        return keep

    with ExitStack() as stack:
        for layer in range(model.n_layers):
            block = block_of(model.hf, model.anatomy, layer).whole
            if layer == 0:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after(layer)).remove)
        model.hf(**_inputs(model, batch), use_cache=False)
    states = torch.stack([kept[place] for place in range(model.n_layers + 1)])
    if not torch.isfinite(states).all():
        raise InputError(f"{model.name}: its residual stream has numbers that are not finite; is the checkpoint sound?")
    return Stream(states, tuples[0])


def _inputs(model: Model, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        inputs["logits_to_keep"] = 1  # none is looked at, and the head costs as much as a layer
    return inputs


@torch.inference_mode()
def patched_logits(
    model: Model, batch: Batch, states: Float[Tensor, "layer scored d_model"]
) -> tuple[Float[Tensor, "scored vocab"], Iterator[Float[Tensor, "scored vocab"]]]:
    """Logits with what one block hands on replaced at the scored positions, one layer at a time.

    A forward that is patched after block l is the model's own up to there, so it branches off there: L layers take
    (L + 1) / 2 forwards instead of L.

    Args:
        model: what is patched and scored.
        batch: where: its scored positions, which are scored too.
        states: what is put there, layer by layer.

    Returns:
        The model's own logits, and those patched after each block, in their order; float32 or wider.

    Raises:
        InputError: the model does something between its blocks, so that they cannot be run one by one.
    """
    batch = batch.trimmed().to(model.device)
    inputs = block_inputs(model.hf, model.anatomy, batch)
    streams = [inputs.hidden]
    for layer in range(model.n_layers):
        block = block_of(model.hf, model.anatomy, layer).whole
        args, kwargs = inputs.arguments(layer, 1)
        # A block may write into what it is given, and every branch is its own tensor.
        outputs = (block(stream, *args, **kwargs) for stream in streams)
        streams = [output[0] if isinstance(output, tuple) else output for output in outputs]
        streams.append(_replaced(streams[0], batch, states[layer]))

    def logits(stream: Tensor) -> Float[Tensor, "scored vocab"]:
        at = stream[batch.rows.to(stream.device), batch.columns.to(stream.device)]
        return head_logits(model, at, as_tuple=inputs.as_tuple)

    @torch.inference_mode()
    def patched() -> Iterator[Float[Tensor, "scored vocab"]]:
        for stream in streams[1:]:
            yield logits(stream)

    return logits(streams[0]), patched()


def _replaced(stream: Tensor, batch: Batch, states: Float[Tensor, "scored d_model"]) -> Tensor:
    changed = stream.clone()
    changed[batch.rows.to(stream.device), batch.columns.to(stream.device)] = states.to(stream.device, stream.dtype)
    return changed


def even_batches(prompts: Prompts, items: Sequence[Prompt], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """Batches of items of about one length, with their places among the items.

    Args:
        prompts: says what batches are padded with.
        items: what to batch.
        batch_size: most of them in one batch.
    """
    order = sorted(range(len(items)), key=lambda place: len(items[place].input_ids))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        (batch,) = replace(prompts, items=tuple(items[place] for place in places)).batches(len(places))
        yield places, batch


def mean_logprobs(logits: Float[Tensor, "scored vocab"], batch: Batch) -> Float[np.ndarray, " example"]:
    """Mean log-probability of each example's answer tokens, in nats.

    Raises:
        InputError: logits that are not finite.
    """
    rows, tokens = batch.rows.to(logits.device), batch.next_tokens.to(logits.device)
    of_token = answer_logprob(logits.log_softmax(-1), tokens)
    if not torch.isfinite(of_token).all():  # as soon as one logit is not
        raise InputError("states give logits that are not finite; is a checkpoint broken?")
    return np.asarray(per_example(of_token, rows, len(batch.examples)).cpu().numpy())


def states_at(
    model: Model, prompts: Prompts, items: Sequence[Prompt], *, batch_size: int
) -> Float[Tensor, "place scored d_model"]:
    """The residual stream at the scored positions of all items, in their order, on the CPU.

    Args:
        model: whose.
        prompts: says what batches are padded with.
        items: what it reads.
        batch_size: most of them in one batch; no number depends on it.
    """
    found: dict[int, Tensor] = {}
    for places, batch in even_batches(prompts, items, batch_size):
        counts = [len(items[place].scored) for place in places]
        states = residual_stream(model, batch).states.cpu()
        found |= dict(zip(places, states.split(counts, dim=1), strict=True))
    return torch.cat([found[place] for place in range(len(items))], dim=1)
