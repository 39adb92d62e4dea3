"""Combine the forget and the retain loss of an optimizer step into one update: by weights, fixed or learned."""

from dataclasses import dataclass
from typing import Any, Protocol

from unlearning.objectives.bilevel import Clamp, First, Scope


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


@dataclass(frozen=True)
class Bilevel:
    """One loss first: remove the other gradient's component along its gradient (`unlearning.objectives.bilevel`).

    The two gradients are accumulated separately over the whole step batch and combined once; both losses have weight 1.

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

    def weights(self) -> tuple[float, float]:
        """Return 1 and 1: gradients are weighted, not losses."""
        return 1.0, 1.0

    def after_step(self, retain_loss: float | None) -> dict[str, float]:  # noqa: ARG002
        """Return no logs: nothing is learned."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return no state: nothing is learned."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Do nothing: nothing is learned."""
