"""How interventions are run.

An engine is a function `sweep(base, target, batch, interventions) -> Sweep`. Engines differ in speed, never in
numbers: what scores them reads only the logits at the scored positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from unlearning.errors import InputError

if TYPE_CHECKING:
    from dissect.interventions import Intervention
    from dissect.pairs import Model
    from dissect.prompts import Batch


@dataclass(frozen=True, eq=False)
class Sweep:
    """The logits of one batch under every intervention, at its scored positions.

    Attributes:
        base: the base model's.
        target: the target's, before any intervention.
        intervened: the target's under each intervention, in the order they were given, made when asked for.
    """

    base: Float[Tensor, "scored vocab"]
    target: Float[Tensor, "scored vocab"]
    intervened: Iterator[Float[Tensor, "scored vocab"]]


Engine = Callable[["Model", "Model", "Batch", Sequence["Intervention"]], Sweep]


def find_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        InputError: there is none.
    """
    if name != "reference":
        raise InputError(f"--engine {name}: unknown; there is reference")
    from dissect.engine import reference

    return reference.sweep
