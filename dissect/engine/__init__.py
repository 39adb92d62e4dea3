"""How interventions are run.

An engine is a function `(layers, batches, interventions, donor, chunk, advance) -> Iterator[list[Sweep]]`: for each
batch one sweep of each target. Engines differ in speed, never in numbers: what scores them reads only the logits at the
scored positions.
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
    """The logits of one batch under every intervention, at its scored positions, in float32 or wider.

    Attributes:
        base: the base model's.
        target: the target's, before any intervention.
        intervened: the target's under each intervention, in the order they were given, made when asked for.
    """

    base: Float[Tensor, "scored vocab"]
    target: Float[Tensor, "scored vocab"]
    intervened: Iterator[Float[Tensor, "scored vocab"]]


Advance = Callable[[float], None]
"""Told which further share of all work is done."""

Engine = Callable[
    ["Layers", "Sequence[Batch]", "Sequence[Intervention]", "Donor", "Chunk", Advance],
    Iterator[list[Sweep]],
]


def targets_of(models: "Sequence[Model]", donor: "Donor") -> "Sequence[Model]":
    """The targets among a sweep's models: base first, then the donor's where it is another one, then the targets."""
    return models[1:] if donor.model is models[0] else models[2:]


def find_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        InputError: there is none.
    """
    if name == "wavefront":
        from dissect.engine import wavefront

        return wavefront.sweep
    if name == "reference":
        from dissect.engine import reference

        return reference.sweep
    raise InputError(f"--engine {name}: unknown; there are {' and '.join(ENGINES)}")
