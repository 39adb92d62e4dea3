"""How the forget and the retain loss of an optimizer step become one update: by weights, fixed or learned."""

from dataclasses import dataclass
from typing import Any, Protocol

from unlearning.objectives.bilevel import Clamp, Scope


class Combination(Protocol):
    """Weights of the two losses; whether their gradients are kept apart until the end of the step."""

    def weights(self) -> tuple[float, float]:
        """What the forget and the retain loss of the present step are multiplied by."""

    def after_step(self, retain_loss: float | None) -> dict[str, float]:
        """Learn from the step's retain loss (over the whole window, on all processes); returns what to log."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state."""


@dataclass(frozen=True)
class WeightedSum:
    """J = gamma * forget + alpha * retain."""

    gamma: float = 1.0
    alpha: float = 1.0

    def weights(self) -> tuple[float, float]:
        """Gamma and alpha."""
        return self.gamma, self.alpha

    def after_step(self, retain_loss: float | None) -> dict[str, float]:  # noqa: ARG002
        """Nothing is learned."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


@dataclass
class DualAscent:
    """Forget under the constraint that the retain loss stays below epsilon: the retain weight is its multiplier.

    J = gamma * forget + lambda * (retain - epsilon), and once per optimizer step, after a warm-up,
    lambda <- max(0, lambda + eta * (retain - epsilon)).

    Attributes:
        gamma: weight of the forget loss.
        multiplier: lambda.
        epsilon: bound of the retain loss, in its own unit.
        eta: step of the dual ascent.
        warmup_steps: optimizer steps before lambda moves.
        steps: optimizer steps so far.

    Source: Constrained Entropic Unlearning, arXiv 2506.05314.
    """

    gamma: float
    multiplier: float
    epsilon: float
    eta: float
    warmup_steps: int = 0
    steps: int = 0

    def weights(self) -> tuple[float, float]:
        """Gamma and the present lambda."""
        return self.gamma, self.multiplier

    def after_step(self, retain_loss: float | None) -> dict[str, float]:
        """Ascend on lambda, and log its new value."""
        assert retain_loss is not None
        self.steps += 1
        if self.steps > self.warmup_steps:
            self.multiplier = max(0.0, self.multiplier + self.eta * (retain_loss - self.epsilon))
        return {"retain_multiplier": self.multiplier}

    def state(self) -> dict[str, Any]:
        """Lambda and the step."""
        return {"multiplier": self.multiplier, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's lambda and step."""
        self.multiplier, self.steps = state["multiplier"], state["steps"]


@dataclass(frozen=True)
class Bilevel:
    """Forget first: the retain gradient loses its component along the forget gradient (see `bilevel`).

    The two gradients are accumulated apart over the whole window and combined once, so that the losses themselves
    have weight 1.

    Attributes:
        gamma: how far each step goes along the forget gradient.
        scope: over what the two gradients are one vector: "global" (all parameters), "layer" or "tensor".
        clamp: "none", "nonnegative" or "pcgrad".

    Source: BLUR, arXiv 2506.08164.
    """

    gamma: float
    scope: Scope = "global"
    clamp: Clamp = "none"

    def weights(self) -> tuple[float, float]:
        """1 and 1: gradients are weighed, not losses."""
        return 1.0, 1.0

    def after_step(self, retain_loss: float | None) -> dict[str, float]:  # noqa: ARG002
        """Nothing is learned."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""
