"""The residual stream at the scored positions: read in one forward pass, decoded by a head, patched into another.

States are block outputs, recorded by hooks. `output_hidden_states` would return the last one after the final norm, and
a model that gets it back would apply the norm twice.
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

from dissect.engine.blocks import block_inputs
from dissect.models.anatomy import block_of
from dissect.models.hooks import states_of
from dissect.models.model import Model
from dissect.models.taken_apart import logits_of
from dissect.prompts.prompts import Batch, Prompt, Prompts
from dissect.scoring.recovery import answer_logprob, per_example
from unlearning.common.errors import InputError


@dataclass(frozen=True, eq=False)
class Stream:
    """A model's residual stream at a batch's scored positions.

    Attributes:
        states: Boundary 0 is the input of the first block, boundary l + 1 the output of block l, before any final norm.
        as_tuple: Whether the model's blocks return tuples, which the head of the same architecture has to know.
    """

    states: Float[Tensor, "boundary scored d_model"]
    as_tuple: bool

    @torch.inference_mode()
    def logits(self, boundary: int, head: Model) -> Float[Tensor, "scored vocab"]:
        """Apply a model's final norm and head to the states at one boundary (logit lens).

        Args:
            boundary: Index of the boundary.
            head: The model whose norm and head are used.

        Returns:
            The logits, in float32 or wider.
        """
        return head_logits(head, self.states[boundary], as_tuple=self.as_tuple)


def head_logits(
    head: Model, states: Float[Tensor, "scored d_model"], *, as_tuple: bool
) -> Float[Tensor, "scored vocab"]:
    """Apply a model's final norm and head to states; gradients flow through.

    Args:
        head: The model whose norm and head are used.
        states: The states.
        as_tuple: Whether the model's blocks return tuples.

    Returns:
        The logits, on the head's device.
    """
    return logits_of(head.hf, head.anatomy, states.to(head.device), as_tuple=as_tuple).to(head.device)


@torch.inference_mode()
def residual_stream(model: Model, batch: Batch) -> Stream:
    """Read the residual stream of every layer in one forward pass.

    Args:
        model: A model in memory; hooks on it take part.
        batch: The batch whose scored positions are read.

    Returns:
        The states.

    Raises:
        InputError: States are not finite.
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
            tuples.append(isinstance(output, tuple | list))  # the first GPT's blocks return lists
            kept[layer + 1] = scored(states_of(output))

        return keep

    with ExitStack() as stack:
        for layer in range(model.n_layers):
            block = block_of(model.hf, model.anatomy, layer).whole
            if layer == 0:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after(layer)).remove)
        model.hf(**_inputs(model, batch), use_cache=False)
    states = torch.stack([kept[index] for index in range(model.n_layers + 1)])
    if not torch.isfinite(states).all():
        raise InputError(f"{model.name} has states that are not finite. Check the checkpoint")
    return Stream(states, tuples[0])


def _inputs(model: Model, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        inputs["position_ids"] = batch.position_ids
    if "logits_to_keep" in inspect.signature(model.hf.forward).parameters:
        inputs["logits_to_keep"] = 1  # the logits are not used, and the head costs as much as a layer
    return inputs


@torch.inference_mode()
def patched_logits(
    model: Model, batch: Batch, states: Float[Tensor, "layer scored d_model"]
) -> tuple[Float[Tensor, "scored vocab"], Iterator[Float[Tensor, "scored vocab"]]]:
    """Compute logits with the output of one block replaced at the scored positions, one layer at a time.

    A forward pass that is patched after block l equals the model's own up to there, so it branches off there: L layers
    take (L + 1) / 2 forward passes instead of L.

    Args:
        model: The model to patch and score.
        batch: The batch whose scored positions are patched and scored.
        states: The states to put in, layer by layer.

    Returns:
        The model's own logits, and an iterator over the logits patched after each block; float32 or wider.

    Raises:
        InputError: The model does something between its blocks, so that they cannot be run one by one.
    """
    batch = batch.trimmed().to(model.device)
    inputs = block_inputs(model.hf, model.anatomy, batch)
    branches = [inputs.hidden]
    for layer in range(model.n_layers):
        block = block_of(model.hf, model.anatomy, layer).whole
        args, kwargs = inputs.arguments(layer, 1)
        # Every branch is a tensor of its own, because a block may write into its input.
        outputs = (block(branch, *args, **kwargs) for branch in branches)
        branches = [states_of(output) for output in outputs]
        branches.append(_replaced(branches[0], batch, states[layer]))

    def logits(branch: Tensor) -> Float[Tensor, "scored vocab"]:
        at = branch[batch.rows.to(branch.device), batch.columns.to(branch.device)]
        return head_logits(model, at, as_tuple=inputs.as_tuple)

    @torch.inference_mode()
    def patched() -> Iterator[Float[Tensor, "scored vocab"]]:
        for branch in branches[1:]:
            yield logits(branch)

    return logits(branches[0]), patched()


def _replaced(stream: Tensor, batch: Batch, states: Float[Tensor, "scored d_model"]) -> Tensor:
    """Return the residual stream with other states at the scored positions."""
    changed = stream.clone()
    changed[batch.rows.to(stream.device), batch.columns.to(stream.device)] = states.to(stream.device, stream.dtype)
    return changed


def even_batches(prompts: Prompts, items: Sequence[Prompt], batch_size: int) -> Iterator[tuple[list[int], Batch]]:
    """Yield batches of items of similar length, with the indices of the items.

    Args:
        prompts: Prompts that give the padding token.
        items: The items.
        batch_size: Maximum number of items in one batch.

    Yields:
        Indices of the items, and their batch.
    """
    order = sorted(range(len(items)), key=lambda index: len(items[index].input_ids))
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        (batch,) = replace(prompts, items=tuple(items[index] for index in indices)).batches(len(indices))
        yield indices, batch


def mean_logprobs(logits: Float[Tensor, "scored vocab"], batch: Batch) -> Float[np.ndarray, " example"]:
    """Return the mean log-probability of each example's answer tokens, in nats.

    Args:
        logits: Logits at the scored positions.
        batch: The batch.

    Returns:
        One value per example.

    Raises:
        InputError: Logits are not finite.
    """
    rows, tokens = batch.rows.to(logits.device), batch.next_tokens.to(logits.device)
    of_token = answer_logprob(logits.log_softmax(-1), tokens)
    if not torch.isfinite(of_token).all():  # also if only one logit is not finite
        raise InputError("states give logits that are not finite. Check the checkpoints")
    return np.asarray(per_example(of_token, rows, len(batch.examples)).cpu().numpy())


def states_at(
    model: Model, prompts: Prompts, items: Sequence[Prompt], *, batch_size: int
) -> Float[Tensor, "boundary scored d_model"]:
    """Read the residual stream at the scored positions of all items, in their order.

    Args:
        model: The model.
        prompts: Prompts that give the padding token.
        items: The items.
        batch_size: Maximum number of items in one batch; no number depends on it.

    Returns:
        The states, on the CPU.

    Raises:
        InputError: States are not finite.
    """
    found: dict[int, Tensor] = {}
    for indices, batch in even_batches(prompts, items, batch_size):
        counts = [len(items[index].scored) for index in indices]
        states = residual_stream(model, batch).states.cpu()
        found |= dict(zip(indices, states.split(counts, dim=1), strict=True))
    return torch.cat([found[index] for index in range(len(items))], dim=1)
