"""Forward passes that compute only what a loss reads: logits at the answer positions, or one block's output."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    logits, kept, targets = _run(model, batch)
    return AnswerLogits(logits=logits[kept], targets=targets, sequence=kept.nonzero()[:, 0])


def answer_nll(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " token"]:
    """Return the negative log-likelihood of every answer token of the batch, in nats, as one flat list."""
    logits, kept, targets = _run(model, batch)
    return _nll(logits, kept, targets)


def answer_sequence_nll(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " batch"]:
    """Return the negative log-likelihood of each answer, summed over its tokens, in nats."""
    logits, kept, targets = _run(model, batch)
    return sequence_nll(_nll(logits, kept, targets), kept.nonzero()[:, 0], batch.n_sequences)


def answer_divergence(model: PreTrainedModel, batch: TokenBatch) -> Float[Tensor, " token"]:
    """Return KL(reference model || model) of every answer token, in nats, from the batch's `reference_logits`."""
    assert batch.reference_logits is not None
    logits, kept, _ = _run(model, batch)
    return token_divergence(logits.flatten(0, 1), batch.reference_logits, _rows(kept))


def _run(
    model: PreTrainedModel, batch: TokenBatch
) -> tuple[Float[Tensor, "batch kept vocab"], Bool[Tensor, "batch kept"], Int[Tensor, " token"]]:
    """Run the model at the positions where some sequence predicts an answer token.

    The output projection runs at these positions only: with a large vocabulary the rest of the logits would take most
    of the memory.

    Returns:
        The logits there, which of them predict an answer token, and the targets of these.
    """
    mask = batch.predicts_answer
    positions = mask.any(dim=0).nonzero().squeeze(1)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _keeps_logits(model):
        logits = model(**inputs, logits_to_keep=positions).logits
    else:
        logits = model(**inputs).logits[:, positions]
    kept = mask[:, positions]
    targets = batch.input_ids[:, positions + 1] if batch.targets is None else batch.targets[:, positions]
    return logits, kept, targets[kept]


def _nll(
    logits: Float[Tensor, "batch kept vocab"], kept: Bool[Tensor, "batch kept"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    return token_nll(logits.flatten(0, 1), targets, _rows(kept))


def _rows(kept: Bool[Tensor, "batch kept"]) -> Int[Tensor, " token"]:
    """Return the rows of the logits that count.

    A copy of these logits alone would be one more of the largest tensors of a step.
    """
    return kept.flatten().nonzero().squeeze(1)


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


def block_output(model: PreTrainedModel, batch: TokenBatch, layer: int) -> Float[Tensor, "all_token d_model"]:
    """Compute the output of one block at every token that is not padding.

    The blocks above are skipped, except inside a data-parallel wrapper, which needs whole passes.

    Args:
        model: A Hugging Face model, wrapped or not.
        batch: The sequences.
        layer: Index of the block, from 0.

    Returns:
        The hidden states, sequence after sequence, in the model's dtype.

    Raises:
        InputError: The model has no such block.
    """
    modules = blocks(model)
    if not 0 <= layer < len(modules):
        raise InputError(f"`layer` must be from 0 to {len(modules) - 1}, got {layer}")
    stop = not isinstance(model, (DistributedDataParallel, FSDPModule))
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if _keeps_logits(model):
        inputs["logits_to_keep"] = torch.zeros(1, dtype=torch.long, device=batch.input_ids.device)
    with _caught(modules[layer], stop=stop) as caught, suppress(_Enough):
        model(**inputs)
    return caught[0][batch.attention_mask.bool()]


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
