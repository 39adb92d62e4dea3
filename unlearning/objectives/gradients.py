"""Gradients of one optimizer step, summed in float32 and taken away from the parameters, on any number of ranks.

A gradient-level method needs the gradients of its losses apart. With the losses normalised by the whole window:

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accumulator = GradientAccumulator(parameters)
    for batch in window:                    # every backward without synchronisation (DDP's `no_sync`)
        forget_loss(batch).backward()
        accumulator.add()
    forget = accumulator.take()
    ...                                     # the same for the retain loss
    sum_over_ranks([*forget, *retain])
    direction, report = combine(forget, retain, ...)  # unlearning.objectives.bilevel
    put(parameters, direction)              # and now clip and step

Parameters may be plain tensors (one process, DDP) or DTensors (FSDP2's `fully_shard`). `fully_shard` reduces every
backward by itself and divides by the number of ranks, so there a window-normalised loss is multiplied by it. Gradients
that an engine hides or flattens (FSDP1, DeepSpeed) are not for these functions. Scaled for float16, they must be
unscaled before they are taken.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


class GradientAccumulator:
    """The sum of the gradients of several backwards, for parameters in a fixed order.

    Of a parameter in half precision each backward's `.grad` is moved into a float32 sum, since a sum in bfloat16 stops
    growing once it is 256 times a term. Of others autograd's own sum in `.grad` serves, without a copy.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self._sums: list[Tensor | None] = [None] * len(self.parameters)

    def add(self) -> None:
        """Count in the last backward; to be called after every one."""
        for place, parameter in enumerate(self.parameters):
            if parameter.dtype not in HALF or parameter.grad is None:
                continue
            total = self._sums[place]
            self._sums[place] = parameter.grad.float() if total is None else total.add_(parameter.grad)
            parameter.grad = None

    def take(self) -> list[Tensor]:
        """The sums so far, in float32 at least; the parameters and this accumulator are left without any.

        A parameter that no loss reached has a gradient of zeros.
        """
        taken = []
        for place, parameter in enumerate(self.parameters):
            total = self._sums[place] if parameter.dtype in HALF else parameter.grad
            taken.append(_zeros(parameter) if total is None else total)
            self._sums[place] = parameter.grad = None
        return taken


def put(parameters: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
    """Make these the gradients that the optimizer sees, in each parameter's dtype."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)


def sum_over_ranks(gradients: Iterable[Tensor]) -> None:
    """Add up each gradient over all ranks, in place; in a single process nothing happens.

    DTensors are left alone: whoever sharded them has reduced them.
    """
    if not _is_distributed() or dist.get_world_size() == 1:
        return
    pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients if not _is_sharded(gradient)]
    for work in pending:
        work.wait()


def products(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> Float[Tensor, "tensor 3"]:
    """<f, f>, <r, f> and <r, r> of each pair of tensors, over all their shards, in float64 on the CPU.

    Every product is accumulated in float64. The scalars of sharded tensors are added up over the mesh dimensions that
    shard them; a replicated dimension is counted once.
    """
    rows = [_products(local(f), local(r)) for f, r in zip(forget, retain, strict=True)]
    table = torch.stack([row.to(rows[0].device) for row in rows])
    for group, places in _shard_groups(forget):
        share = table[places]
        dist.all_reduce(share, group=group)
        table[places] = share
    return table.cpu()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself where it is not sharded. Shares its memory."""
    found = tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found.detach()


_PIECE = {"cpu": 2**16, "cuda": 2**24}
"""Values that are widened to float64 together: on a CPU what a core's cache holds, on a GPU enough to keep it busy."""


def _products(f: Tensor, r: Tensor) -> Float[Tensor, " 3"]:
    piece = _PIECE.get(f.device.type, _PIECE["cuda"])
    total = torch.zeros(3, dtype=torch.float64, device=f.device)
    for one, other in zip(f.reshape(-1).split(piece), r.reshape(-1).split(piece), strict=True):
        wide_f, wide_r = one.double(), other.double()
        total += torch.stack([wide_f.dot(wide_f), wide_r.dot(wide_f), wide_r.dot(wide_r)])
    return total


def _shard_groups(tensors: Sequence[Tensor]) -> list[tuple[Any, list[int]]]:
    """The process groups over which tensors are sharded, each with the places of its tensors."""
    found: dict[tuple[Any, int], list[int]] = {}
    for place, tensor in enumerate(tensors):
        if _is_sharded(tensor):
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    found.setdefault((mesh, dimension), []).append(place)
    return [(mesh.get_group(dimension), places) for (mesh, dimension), places in found.items()]


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.float32 if parameter.dtype in HALF else parameter.dtype
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_sharded(tensor: Tensor) -> bool:
    if not _is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
