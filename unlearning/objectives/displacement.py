"""Weights beside the present ones, at which a method takes the gradient of its forget loss.

A displacement moves the trained weights in place before the forget pass of an optimizer step. The trainer keeps a copy
of them (4 bytes per trained parameter in float32) and puts it back, to the bit, before the retain pass. The gradient at
the moved weights is then applied to the present ones: a first-order method, which does not differentiate through the
move.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unlearning.objectives.gradients import Kept, norm_of, placed_like, put

Gradient = Callable[[Any], list[Tensor]]
"""Compute the gradient of a loss over the forget examples of the step batch, at the weights as they are.

Takes a method's loss, or None for the method's own forget loss. Summed over all micro-batches and processes, in float32
or wider, and not weighted.
"""


class Displacement(Protocol):
    """A way to move the weights before the forget pass of a step; one that keeps tensors is a `Kept`."""

    def move(self, parameters: Sequence[Tensor], gradient: Gradient, step: int) -> dict[str, float]:
        """Move the weights in place.

        Args:
            parameters: The weights that train.
            gradient: Computes gradients at the weights as they are.
            step: Number of the optimizer step, from 0.

        Returns:
            Values to log.
        """


@dataclass(frozen=True)
class Ascent:
    """Move along the gradient of the forget loss, to where it is higher: theta + rho f / ||f||.

    A step costs one more forward and backward pass over the forget examples.

    Attributes:
        rho: Length of the move, over all trained weights.

    Source: sharpness-aware minimisation, as in SAM-NPO, arXiv 2502.05374.
    """

    rho: float

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], gradient: Gradient, step: int) -> dict[str, float]:  # noqa: ARG002
        """Move the weights; a zero gradient moves nothing."""
        direction = gradient(None)
        norm = norm_of(direction)
        if norm > 0:
            for parameter, towards in zip(parameters, direction, strict=True):
                parameter.add_(towards, alpha=self.rho / norm)
        return {"ascent_grad_norm": norm}


@dataclass(frozen=True)
class Noise:
    """Move by normal noise, another one at every step: randomised smoothing with one draw.

    Attributes:
        sigma: Standard deviation of the noise on each weight.
        seed: Seed of all draws.

    Source: smoothing of unlearning, arXiv 2502.05374.
    """

    sigma: float
    seed: int

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], gradient: Gradient, step: int) -> dict[str, float]:  # noqa: ARG002
        """Move the weights; the noise hangs on the seed, the step and the shapes, not on device or processes."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.add_(placed_like(drawn, parameter), alpha=self.sigma)
        return {}


@dataclass(frozen=True)
class Attack:
    """Move as an attacker does who trains on the forget examples: some steps of Adam with a fresh state.

    The number of steps is drawn at every optimizer step from 0 to `steps`, so that the gradients that are taken are, on
    average, those along the attacker's way, the present weights included. Each of his steps costs a forward and a
    backward pass over the forget examples; his moments take 8 bytes per trained parameter while he moves.

    Attributes:
        loss: The loss that the attacker lowers.
        learning_rate: His learning rate.
        steps: Most steps.
        seed: Seed of the numbers of steps.
    """

    loss: Any
    learning_rate: float
    steps: int
    seed: int

    def move(self, parameters: Sequence[Tensor], gradient: Gradient, step: int) -> dict[str, float]:
        """Move the weights."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        count = int(torch.randint(self.steps + 1, (), generator=generator))
        attacker = torch.optim.Adam(list(parameters), lr=self.learning_rate)
        for _ in range(count):
            put(parameters, gradient(self.loss))
            attacker.step()
            attacker.zero_grad()
        return {"attack_steps": float(count)}


@dataclass
class Adversary(Kept):
    """Move to the weights of an adversary who relearns beside the training, one step of gradient descent per step.

    Every so many steps he begins again from the present weights; in between he goes on from his own. A step costs one
    more forward and backward pass over the forget examples; his weights take 4 bytes per trained parameter in float32.

    Attributes:
        loss: The loss that he lowers.
        learning_rate: His learning rate.
        every: Optimizer steps from one beginning to the next.
        tensors: His weights, after his last step; empty before the first.

    Source: MUDMAN, arXiv 2506.12484.
    """

    loss: Any
    learning_rate: float
    every: int

    @torch.no_grad()
    def move(self, parameters: Sequence[Tensor], gradient: Gradient, step: int) -> dict[str, float]:
        """Move to the adversary's weights, after his step."""
        if step % self.every:
            for parameter, his in zip(parameters, self.tensors, strict=True):
                parameter.copy_(his)
        for parameter, towards in zip(parameters, gradient(self.loss), strict=True):
            parameter.sub_(towards, alpha=self.learning_rate)
        self.tensors = [parameter.detach().clone() for parameter in parameters]
        return {}


def seed_of(seed: int, step: int) -> int:
    """Return the seed of an optimizer step's draws."""
    return seed * 1_000_003 + step
