"""The methods that are timed, and the options that both sides train with. Light: loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from unlearning.common.errors import InputError

LEARNING_RATE = 1e-5
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
BETA = 0.1


@dataclass(frozen=True)
class Method:
    """A method as the benchmark runs it.

    Attributes:
        name: Name on the command line.
        toolkit: Name of the method in the toolkit.
        options: Its options there.
        uses_forget: Read forget examples.
        preference: The forget loss is NPO; else gradient ascent.
        divergence: The retain loss is the divergence from the reference model; else the cross-entropy.
        bilevel: Combine the two gradients as BLUR does; else add the losses.
    """

    name: str
    toolkit: str
    options: Mapping[str, str | float] = field(default_factory=dict)
    uses_forget: bool = True
    preference: bool = False
    divergence: bool = False
    bilevel: bool = False

    @property
    def second_model(self) -> bool:
        """Whether the straightforward trainer keeps a second model for it."""
        return self.preference or self.divergence


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("finetune", "finetune", uses_forget=False),
        Method("grad_diff", "grad_diff", {"alpha": 1.0}),
        Method("npo_nll", "npo", {"beta": BETA, "alpha": 1.0}, preference=True),
        Method("npo_kl", "npo", {"beta": BETA, "alpha": 1.0, "retain_loss": "kl"}, preference=True, divergence=True),
        Method("blur", "blur", {"beta": BETA, "gamma": 1.0}, preference=True, bilevel=True),
    )
}


def parse_methods(names: str) -> list[Method]:
    """Read a comma-separated list of methods.

    Args:
        names: Names of `METHODS`.

    Returns:
        The methods, each once.

    Raises:
        InputError: A name is unknown, or the list is empty.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in METHODS:
            raise InputError(f"--methods {name}: unknown; there are {', '.join(METHODS)}")
    if not wanted:
        raise InputError(f"--methods: none are named; there are {', '.join(METHODS)}")
    return [METHODS[name] for name in wanted]
