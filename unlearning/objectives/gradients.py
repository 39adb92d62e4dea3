"""Gradients of one optimizer step, summed in float32 and taken off the parameters, on any number of ranks.

A gradient-level method needs the gradients of its losses separately. With losses normalised by the whole step batch:

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accumulator = GradientAccumulator(parameters)
    for batch in step_batch:                # every backward without synchronisation (DDP's `no_sync`)
        forget_loss(batch).backward()
        accumulator.add()
    forget = accumulator.take()
    ...                                     # the same for the retain loss
    sum_over_ranks([*forget, *retain])
    direction, logs = combination.combine(forget, retain, names)  # unlearning.objectives.combination
    put(parameters, direction)              # then clip and step

Parameters may be plain tensors (one process, DDP) or DTensors (FSDP2's `fully_shard`). `fully_shard` reduces every
backward by itself and divides by the number of ranks, so there a normalised loss is multiplied by that number.
Engines that hide or flatten gradients (FSDP1, DeepSpeed) are not supported. Gradients scaled for float16 must be
unscaled before they are taken.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Kept:
    """Tensors that a part of the optimizer step keeps from one step to the next, and that checkpoints keep.

    Attributes:
        tensors: One per trained parameter, of its shape, sharding and (float32 or wider) data type; empty before the
            first step.
    """

    tensors: list[Tensor] = field(default_factory=list, init=False, repr=False)


class GradientAccumulator:
    """The sum of the gradients of several backward passes, for parameters in a fixed order.

    Each `.grad` of a parameter in half precision is moved into a float32 sum, since a sum in bfloat16 stops growing
    once it is 256 times a term. Of other parameters autograd's own sum in `.grad` is used, without a copy.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        """Create an empty sum for these parameters."""
        self.parameters = list(parameters)
        self._sums: list[Tensor | None] = [None] * len(self.parameters)

    def add(self) -> None:
        """Add the gradients of the last backward pass; to be called after every backward pass."""
        for index in range(len(self.parameters)):
            self._move(index)

    def _move(self, index: int) -> None:
        """Move a gradient in half precision into its sum."""
        parameter = self.parameters[index]
        if parameter.dtype not in HALF or parameter.grad is None:
            return
        total = self._sums[index]
        self._sums[index] = parameter.grad.float() if total is None else total.add_(parameter.grad)
        parameter.grad = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Add each gradient as soon as a backward pass has it, so that few in half precision are in memory together.

        Not for sharded parameters, whose gradients are reduced later.

        Yields:
            Nothing; backward passes within the context need no `add`.
        """
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._move(index))
            for index, parameter in enumerate(self.parameters)
            if parameter.dtype in HALF
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> list[Tensor]:
        """Take the sums so far off the parameters and this accumulator, which are left without gradients.

        Returns:
            One tensor per parameter, in float32 or wider; zeros for a parameter that no loss reached.
        """
        taken = []
        for index, parameter in enumerate(self.parameters):
            total = self._pop(index)
            taken.append(_zeros(parameter) if total is None else total)
        return taken

    def take_reached(self) -> tuple[list[Tensor], list[Tensor]]:
        """Take the sums as `take` does, of those parameters alone that a loss reached.

        Returns:
            These parameters, and one tensor for each.
        """
        totals = [(parameter, self._pop(index)) for index, parameter in enumerate(self.parameters)]
        reached = [(parameter, total) for parameter, total in totals if total is not None]
        return [parameter for parameter, _ in reached], [total for _, total in reached]

    def _pop(self, index: int) -> Tensor | None:
        parameter = self.parameters[index]
        total = self._sums[index] if parameter.dtype in HALF else parameter.grad
        self._sums[index] = parameter.grad = None
        return total


def put(parameters: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
    """Set the gradients that the optimizer sees, in each parameter's dtype."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)


def sum_over_ranks(gradients: Iterable[Tensor]) -> None:
    """Sum each gradient over all ranks, in place; do nothing in a single process.

    DTensors are left unchanged: `fully_shard` has reduced them.
    """
    if not _is_distributed() or dist.get_world_size() == 1:
        return
    pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients if not is_sharded(gradient)]
    for work in pending:
        work.wait()


def products(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> Float[Tensor, "tensor 3"]:
    """Compute <f, f>, <r, f> and <r, r> of each pair of tensors, over all their shards.

    Every product is accumulated in float64. The scalars of sharded tensors are summed over the mesh dimensions that
    shard them; a replicated dimension is counted once.

    Args:
        forget: f, plain tensors or DTensors.
        retain: r, of the same shapes and sharding.

    Returns:
        One row per pair, in float64 on the CPU.
    """
    rows = [_products(local(f), local(r)) for f, r in zip(forget, retain, strict=True)]
    table = torch.stack([row.to(rows[0].device) for row in rows])
    for group, indices in _shard_groups(forget):
        share = table[indices]
        dist.all_reduce(share, group=group)
        table[indices] = share
    return table.cpu()


def norm_of(gradients: Sequence[Tensor]) -> float:
    """Return the length of a gradient over all parameters and processes, accumulated in float64."""
    return math.sqrt(float(products(gradients, gradients)[:, 0].sum()))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; a tensor that is not sharded is its own part."""
    found = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return found.detach()


_PIECE = {"cpu": 2**16, "cuda": 2**24}
"""Number of values that are converted to float64 together: on a CPU they fit into a core's cache, on a GPU they keep it
busy."""


def _products(f: Tensor, r: Tensor) -> Float[Tensor, " 3"]:
    piece = _PIECE.get(f.device.type, _PIECE["cuda"])
    total = torch.zeros(3, dtype=torch.float64, device=f.device)
    for one, other in zip(f.reshape(-1).split(piece), r.reshape(-1).split(piece), strict=True):
        wide_f, wide_r = one.double(), other.double()
        total += torch.stack([wide_f.dot(wide_f), wide_r.dot(wide_f), wide_r.dot(wide_r)])
    return total


def _shard_groups(tensors: Sequence[Tensor]) -> list[tuple[Any, list[int]]]:
    """Return the process groups over which tensors are sharded, each with the indices of its tensors."""
    found: dict[tuple[Any, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    found.setdefault((mesh, dimension), []).append(index)
    return [(mesh.get_group(dimension), indices) for (mesh, dimension), indices in found.items()]


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.float32 if parameter.dtype in HALF else parameter.dtype
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is one of FSDP's, of which this process holds a part."""
    if not _is_distributed():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor on the CPU; of one that is sharded every process must ask for it."""
    whole = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole.detach().cpu()


def placed_like(values: Tensor, parameter: Tensor) -> Tensor:
    """Return values on the parameter's device; this process's part of them if the parameter is sharded."""
    if not is_sharded(parameter):
        return values.to(parameter)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(values.to(parameter.device, parameter.dtype), mesh, placements)
