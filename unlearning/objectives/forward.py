"""Forward passes that compute only what a loss reads: logits at the answer positions, or one block's output."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.data.batches import TokenBatch
from unlearning.objectives.losses import sequence_nll, token_divergence, token_nll


@dataclass(frozen=True)
class AnswerLogits:
    """The answer tokens of a batch as one flat list.

    Attributes:
        logits: Logits that predict each answer token.
        targets: The answer tokens, or the labels in their place.
        sequence: Index of the sequence that each token belongs to.
    """

    logits: Float[Tensor, "token vocab"]
    targets: Int[Tensor, " token"]
    sequence: Int[Tensor, " token"]


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Return the Hugging Face model inside a data-parallel wrapper and an adapter, or the model itself without them."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def answer_logits(model: PreTrainedModel, batch: TokenBatch) -> AnswerLogits:
    """Run the model and return the logits that predict answer tokens."""
    run = _run(model, batch)
    logits = run.logits if run.rows is None else run.logits[run.rows]
    return AnswerLogits(logits=logits, targets=run.targets, sequence=run.sequence)


def answer_nll(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " token"]:
    """Return the negative log-likelihood of every answer token of the batch, in nats, as one flat list."""
    run = _run(model, batch)
    return token_nll(run.logits, run.targets, run.rows)


def answer_sequence_nll(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " batch"]:
    """Return the negative log-likelihood of each answer, summed over its tokens, in nats."""
    run = _run(model, batch)
    return sequence_nll(token_nll(run.logits, run.targets, run.rows), run.sequence, batch.n_sequences)


def answer_divergence(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " token"]:
    """Return KL(reference model || model) of every answer token, in nats, from the batch's `reference_logits`."""
    assert batch.reference_logits is not None
    run = _run(model, batch)
    return token_divergence(run.logits, batch.reference_logits, run.rows)


@dataclass(frozen=True)
class _Run:
    """The result of a forward pass.

    Attributes:
        logits: Logits of the positions that were computed.
        rows: Row of each answer token's logits; None if the logits are those of the answer tokens alone.
        targets: The answer tokens, or the labels in their place.
        sequence: Index of the sequence that each token belongs to.
    """

    logits: Float[Tensor, "row vocab"]
    rows: Int[Tensor, " token"] | None
    targets: Int[Tensor, " token"]
    sequence: Int[Tensor, " token"]


def _run(model: PreTrainedModel, batch: TokenBatch) -> _Run:
    """Run the model, with the output projection at the answer tokens alone.

    With a large vocabulary the rest of the logits would take most of the memory, and much of the time.

    Returns:
        The logits and what they predict.
    """
    mask = batch.predicts_answer
    positions = mask.any(dim=0).nonzero().squeeze(1)
    kept = mask[:, positions]
    targets = batch.input_ids[:, positions + 1] if batch.targets is None else batch.targets[:, positions]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _keeps_logits(model):
        with _projecting_rows(model, kept) as projected:
            logits = model(**inputs, logits_to_keep=positions).logits
    else:
        projected = []
        logits = model(**inputs).logits[:, positions]
    # A copy of the rows that count would be one more of the largest tensors of a step.
    rows = None if projected else kept.flatten().nonzero().squeeze(1)
    return _Run(logits.flatten(0, 1), rows, targets[kept], kept.nonzero()[:, 0])


@contextmanager
def _projecting_rows(model: nn.Module, kept: Bool[Tensor, "batch kept"]) -> Iterator[list[bool]]:
    """Let the output projection read the hidden states that count, as one sequence.

    `logits_to_keep` takes the same positions of every sequence; answers of a batch begin and end at different ones.

    Yields:
        A list that is not empty once the projection has read them; it stays empty where the model calls its output
        projection in a way of its own.
    """
    done: list[bool] = []
    projection = unwrapped(model).get_output_embeddings()

    def choose(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        (hidden, *others) = inputs
        if done or not isinstance(hidden, Tensor) or hidden.shape[:2] != kept.shape or hidden.dim() != 3:
            return None
        done.append(True)
        return (hidden[kept][None], *others)

    handle = projection.register_forward_pre_hook(choose) if isinstance(projection, nn.Module) else None
    try:
        yield done
    finally:
        if handle is not None:
            handle.remove()


def blocks(model: nn.Module) -> nn.ModuleList:
    """Find the model's blocks: its only list of as many modules as the configuration has layers.

    Args:
        model: A Hugging Face model, wrapped or not.

    Returns:
        The blocks, from the first to the last.

    Raises:
        InputError: The model has no such list, or more than one.
    """
    inner = unwrapped(model)
    n_layers = int(inner.config.get_text_config().num_hidden_layers)
    lists = [module for module in inner.modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    if len(lists) != 1:
        raise InputError(
            f"{type(inner).__name__}: its blocks could not be found; use a method that reads no hidden states"
        )
    return lists[0]


def block_output(
    model: PreTrainedModel, batch: TokenBatch, layer: int | tuple[int, ...]
) -> Float[Tensor, "all_token width"]:
    """Compute the output of a block, or of several, at every token that is not padding.

    The blocks above are skipped, except inside a data-parallel wrapper, which needs whole passes.

    Args:
        model: A Hugging Face model, wrapped or not.
        batch: The sequences.
        layer: Index of the block, from 0, or the indices of several in rising order.

    Returns:
        The hidden states, sequence after sequence, in the model's dtype; those of several blocks side by side, so that
        the width is that many times d_model.

    Raises:
        InputError: The model has no such block.
    """
    modules = blocks(model)
    layers = (layer,) if isinstance(layer, int) else layer
    for index in layers:
        if not 0 <= index < len(modules):
            raise InputError(f"`layer` must be from 0 to {len(modules) - 1}, got {index}")
    stop = not isinstance(model, (DistributedDataParallel, FSDPModule))
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _keeps_logits(model):
        inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=batch.input_ids.device)
    with ExitStack() as stack:
        caught = [stack.enter_context(_caught(modules[index], stop=stop and index == layers[-1])) for index in layers]
        stack.enter_context(suppress(_Enough))
        model(**inputs)
    outputs = [found[0][batch.attention_mask.bool()] for found in caught]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class _Enough(Exception):
    """Raised to stop the forward pass after the block whose output is wanted."""


@contextmanager
def _caught(module: nn.Module, *, stop: bool) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if stop:
            raise _Enough

    handle = module.register_forward_hook(catch)
    try:
        yield outputs
    finally:
        handle.remove()


def _keeps_logits(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
