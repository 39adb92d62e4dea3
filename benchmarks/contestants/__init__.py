"""Ways to run the same sweep, each in its own file behind one signature.

A contestant is a function `prepare(pair, interventions) -> run`, and `run(batches)` gives KRS. What belongs to loading,
as wrapping the loaded models, is in `prepare` and is not timed; what is done anew for every sweep, recording the base's
activations first of all, is in `run` and is.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.interventions.intervention import Intervention
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch
from dissect.scoring.recovery import knowledge_recovery_score, logit_mse, per_example
from unlearning.common.errors import InputError

Krs = Float[Tensor, "intervention example"]
Run = Callable[[Sequence[Batch]], Krs]
Prepare = Callable[[ModelPair, Sequence[Intervention]], Run]


@dataclass(frozen=True)
class Contestant:
    """One way to run the sweep.

    Attributes:
        name: Name on the command line, and of the module in this package.
        meaning: One line for help texts.
        package: A package that the project itself does not need.
    """

    name: str
    meaning: str
    package: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether what it needs is there."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    @property
    def install_command(self) -> str:
        """What gets it there."""
        return f"pip install -c constraints.txt {self.package}"

    def load(self) -> Prepare:
        """Return the contestant's `prepare` function."""
        prepare: Prepare = importlib.import_module(f"{__name__}.{self.name}").prepare
        return prepare


OURS = "wavefront"

CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant(OURS, "this toolkit: every intervention in one pass over the layers"),
        Contestant("reference", "this toolkit's oracle: one hooked forward per intervention"),
        Contestant("notebook", "the released notebooks' protocol in plain PyTorch hooks"),
        Contestant("transformer_lens", "run_with_cache and run_with_hooks on TransformerBridge"),
        Contestant("nnsight", "one nnsight trace per intervention", package="nnsight"),
    )
}


def parse_contestants(text: str) -> list[Contestant]:
    """Read a comma-separated list of contestants.

    Args:
        text: Names of `CONTESTANTS`.

    Returns:
        The contestants; this toolkit's is always the first.

    Raises:
        InputError: A name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CONTESTANTS:
            raise InputError(f"--against {name}: unknown contestant; there are {', '.join(CONTESTANTS)}")
    return [CONTESTANTS[name] for name in dict.fromkeys([OURS, *names])]


def batch_by_batch(run: Callable[[Batch], Krs]) -> Run:
    """Return the sweep of a contestant that handles one batch at a time."""
    return lambda batches: torch.cat([run(batch) for batch in batches], dim=1)


def krs_table(
    base: Float[Tensor, "scored vocab"],
    target: Float[Tensor, "scored vocab"],
    intervened: Iterable[Float[Tensor, "scored vocab"]],
    batch: Batch,
) -> Krs:
    """KRS of every intervention on every example, from float32 logits; the same arithmetic for every contestant."""
    rows = batch.rows.to(base.device)

    def loss(scored: Tensor) -> Float[Tensor, " example"]:
        return per_example(logit_mse(base, scored), rows, len(batch.examples))

    before = loss(target)
    return torch.stack([knowledge_recovery_score(loss(scored), before) for scored in intervened]).cpu()
