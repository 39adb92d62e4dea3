"""Combine the forget and the retain loss of an optimizer step into one update.

The losses are weighted, by fixed or learned weights (`Combination`), or their gradients are combined
(`GradientCombination`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unlearning.objectives import bilevel
from unlearning.objectives.bilevel import Clamp, First, Scope
from unlearning.objectives.gradients import Kept, local, norm_of


class Combination(Protocol):
    """Weights of the two losses, and what the training loop asks of them at every step."""

    def weights(self) -> tuple[float, float]:
        """Return the factors of the present step's forget and retain loss."""

    def after_step(self, retain_loss: float | None) -> dict[str, float]:
        """Learn from the step's retain loss.

        Args:
            retain_loss: Retain loss over the whole step batch, on all processes; None if the method has none.

        Returns:
            Values to log.
        """

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""


@dataclass(frozen=True)
class WeightedSum:
    """J = gamma * forget + alpha * retain.

    Attributes:
        gamma: Weight of the forget loss.
        alpha: Weight of the retain loss.
    """

    gamma: float = 1.0
    alpha: float = 1.0

    def weights(self) -> tuple[float, float]:
        """Return gamma and alpha."""
        return self.gamma, self.alpha

    def after_step(self, retain_loss: float | None) -> dict[str, float]:  # noqa: ARG002
        """Return no logs: the weights are fixed."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return no state: the weights are fixed."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing: the weights are fixed."""


@dataclass
class DualAscent:
    """Forget under the constraint that the retain loss stays below epsilon: the retain weight is its multiplier.

    J = gamma * forget + lambda * (retain - epsilon), and once per optimizer step, after a warm-up,
    lambda <- max(0, lambda + eta * (retain - epsilon)).

    Attributes:
        gamma: Weight of the forget loss.
        multiplier: lambda.
        epsilon: Bound of the retain loss, in the loss's unit.
        eta: Step size of the dual ascent.
        warmup_steps: Optimizer steps before lambda moves.
        steps: Optimizer steps so far.

    Source: Constrained Entropic Unlearning, arXiv 2506.05314.
    """

    gamma: float
    multiplier: float
    epsilon: float
    eta: float
    warmup_steps: int = 0
    steps: int = 0

    def weights(self) -> tuple[float, float]:
        """Return gamma and the present lambda."""
        return self.gamma, self.multiplier

    def after_step(self, retain_loss: float | None) -> dict[str, float]:
        """Move lambda by one step of dual ascent, and return its new value to log."""
        assert retain_loss is not None
        self.steps += 1
        if self.steps > self.warmup_steps:
            self.multiplier = max(0.0, self.multiplier + self.eta * (retain_loss - self.epsilon))
        return {"retain_multiplier": self.multiplier}

    def state(self) -> dict[str, Any]:
        """Return lambda and the number of steps."""
        return {"multiplier": self.multiplier, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore lambda and the number of steps."""
        self.multiplier, self.steps = state["multiplier"], state["steps"]


@dataclass
class Schedule:
    """Weights that move over the run from the forget loss to the retain loss.

    At step t of T (from 1): J = gamma (1 - t / 2T) forget + alpha (t / 2T) retain.

    Attributes:
        gamma: Factor of the forget loss.
        alpha: Factor of the retain loss.
        total: T.
        steps: Optimizer steps so far.

    Source: circuit breakers, arXiv 2406.04313, algorithm 1, whose steps count from 0.
    """

    gamma: float
    alpha: float
    total: int
    steps: int = 0

    def weights(self) -> tuple[float, float]:
        """Return the factors of the present step."""
        share = min(self.steps + 1, self.total) / (2 * self.total)
        return self.gamma * (1 - share), self.alpha * share

    def after_step(self, retain_loss: float | None) -> dict[str, float]:  # noqa: ARG002
        """Count the step, and return the retain weight that it had to log."""
        _, retain_weight = self.weights()
        self.steps += 1
        return {"retain_weight": retain_weight}

    def state(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the number of steps."""
        self.steps = state["steps"]


@runtime_checkable
class GradientCombination(Combination, Protocol):
    """One direction from the gradients of the two losses, each over the whole step batch; both losses weigh 1."""

    def combine(
        self, forget: Sequence[Tensor], retain: Sequence[Tensor], names: Sequence[str]
    ) -> tuple[Sequence[Tensor], dict[str, float]]:
        """Combine the gradients, once per optimizer step; either may be overwritten.

        Args:
            forget: One tensor per parameter, summed over micro-batches and ranks; plain tensors or DTensors.
            retain: Of the same shapes and sharding.
            names: Names of the parameters.

        Returns:
            The direction that the optimizer descends, and values to log.
        """

    def weights(self) -> tuple[float, float]:
        """Return 1 and 1: gradients are weighted, not losses."""
        return 1.0, 1.0

    def after_step(self, retain_loss: float | None) -> dict[str, float]:  # noqa: ARG002
        """Return no logs: nothing is learned."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return no numbers; a combination that keeps tensors is a `Kept`."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: ARG002
        """Do nothing: there are no numbers."""
        return


@dataclass(frozen=True)
class Bilevel(GradientCombination):
    """One loss first: remove the other gradient's component along its gradient (`unlearning.objectives.bilevel`).

    Attributes:
        gamma: Multiple of the first gradient that every step keeps.
        first: The gradient to which the other one yields.
        scope: Parameters whose gradients form one vector: "global" (all), "layer" or "tensor".
        clamp: "none", "nonnegative" or "pcgrad".

    Source: BLUR, arXiv 2506.08164.
    """

    gamma: float
    first: First = "forget"
    scope: Scope = "global"
    clamp: Clamp = "none"

    def combine(
        self, forget: Sequence[Tensor], retain: Sequence[Tensor], names: Sequence[str]
    ) -> tuple[Sequence[Tensor], dict[str, float]]:
        """Return BLUR's direction, and its diagnostics."""
        direction, report = bilevel.combine(
            forget, retain, names=names, gamma=self.gamma, first=self.first, scope=self.scope, clamp=self.clamp
        )
        return direction, report.as_logs()


@dataclass
class SignMask(GradientCombination, Kept):
    """Forget only along the coordinates in which that also lowers the retain loss: m f / ||f|| + alpha a.

    a <- momentum a + (1 - momentum) r, from a = 0, and m is 1 where a and f have the same sign, else 0. ||f|| is over
    all trained parameters, before the mask. a takes 4 bytes per trained parameter in float32.

    Attributes:
        momentum: Share of a that a step keeps.
        alpha: Weight of the retain gradients' average.
        tensors: a; empty before the first step.

    Source: MUDMAN, arXiv 2506.12484.
    """

    momentum: float
    alpha: float

    def combine(
        self,
        forget: Sequence[Tensor],
        retain: Sequence[Tensor],
        names: Sequence[str],  # noqa: ARG002
    ) -> tuple[Sequence[Tensor], dict[str, float]]:
        """Return the direction, which overwrites f, with ||f|| and the share of ||f||^2 that the mask lets through."""
        if not self.tensors:
            self.tensors = [torch.zeros_like(gradient) for gradient in retain]
        norm = norm_of(forget)
        for f, r, average in zip(map(local, forget), map(local, retain), map(local, self.tensors), strict=True):
            average.mul_(self.momentum).add_(r, alpha=1 - self.momentum)
            f.mul_(average.sign() == f.sign())
        passed = norm_of(forget)
        for f, average in zip(map(local, forget), map(local, self.tensors), strict=True):
            f.mul_(1 / norm if norm > 0 else 0.0).add_(average, alpha=self.alpha)
        return forget, {"forget_grad_norm": norm, "passed_share": (passed / norm) ** 2 if norm > 0 else 0.0}
