"""Run interventions on a model.

An engine is a function `(layers, batches, interventions, donor, chunk, advance) -> Iterator[list[Sweep]]` that yields,
for each batch, one sweep of each target. Engines differ in speed, never in numbers: scoring reads only the logits at
the scored positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.engine.chunk import Chunk
    from dissect.engine.layers import Layers
    from dissect.interventions.donors import Donor
    from dissect.interventions.intervention import Intervention
    from dissect.models.model import Model
    from dissect.prompts.prompts import Batch

ENGINES = ("wavefront", "reference")


@dataclass(frozen=True, eq=False)
class Sweep:
    """Logits of one batch under every intervention, at the batch's scored positions, in float32 or wider.

    Attributes:
        base: Logits of the base model.
        target: Logits of the target without any intervention.
        intervened: Logits of the target under each intervention, in the order of the interventions; computed when the
            iterator is advanced.
    """

    base: Float[Tensor, "scored vocab"]
    target: Float[Tensor, "scored vocab"]
    intervened: Iterator[Float[Tensor, "scored vocab"]]


Advance = Callable[[float], None]
"""Called with the share of all work, between 0 and 1, that was finished since the last call."""

Engine = Callable[
    ["Layers", "Sequence[Batch]", "Sequence[Intervention]", "Donor", "Chunk", Advance],
    Iterator[list[Sweep]],
]


def targets_of(models: "Sequence[Model]", donor: "Donor") -> "Sequence[Model]":
    """Return the targets among a sweep's models.

    Args:
        models: The base, then the donor's model if it is not the base, then the targets.
        donor: Source of the activations.

    Returns:
        The targets, in the order of the models.
    """
    return models[1:] if donor.model is models[0] else models[2:]


def find_engine(name: str) -> Engine:
    """Return the engine with a name.

    Returns:
        The engine's function.

    Raises:
        InputError: There is no engine with this name.
    """
    if name == "wavefront":
        from dissect.engine import wavefront

        return wavefront.sweep
    if name == "reference":
        from dissect.engine import reference

        return reference.sweep
    raise InputError(f"`engine` must be one of {', '.join(ENGINES)}, got {name!r}")
