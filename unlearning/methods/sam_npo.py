"""SAM-NPO: NPO whose forget gradient is taken where the forget loss is highest nearby, so that forgetting is flat.

Loss: J = gamma F(theta + e) + alpha R(theta), F and R those of NPO; e = rho f / ||f||, f the gradient of F at theta
over the whole step batch (smoothing=sam), or normal noise (smoothing=noise). First order: e is a constant of the step.
Needs: as NPO. A step costs one more forward and backward pass over the forget examples (noise: none), and a copy of the
trained weights.
Source: sharpness-aware unlearning, arXiv 2502.05374. Of the paper's smoothing kin, weight averaging, gradient penalty
and curvature regularisation are not here.
"""

from dataclasses import dataclass
from typing import Literal

from unlearning.methods import npo
from unlearning.methods.method import Method
from unlearning.methods.terms import RetainLoss, retain_term
from unlearning.objectives.displacement import Ascent, Displacement, Noise
from unlearning.options import FORGETS, KEEPS, Condition, option

SOURCE = "SAM-NPO 2502.05374"

_SHARP = Condition(
    "smoothing is sam and gamma above 0", lambda options: options.smoothing == "sam" and options.gamma > 0
)
_NOISY = Condition(
    "smoothing is noise and gamma above 0", lambda options: options.smoothing == "noise" and options.gamma > 0
)


@dataclass(frozen=True)
class SAMNPOOptions:
    """Options of SAM-NPO."""

    smoothing: Literal["sam", "noise"] = option(
        "sam",
        "where the forget gradient is taken: sam (uphill) or noise (normal noise)",
        source=SOURCE,
        read_if=FORGETS,
    )
    rho: float = option(0.01, "length of the move uphill, over all weights", source=SOURCE, above=0, read_if=_SHARP)
    sigma: float = option(0.001, "standard deviation of the noise on each weight", above=0, read_if=_NOISY)
    noise_seed: int = option(0, "seed of the noise", minimum=0, read_if=_NOISY)
    beta: float = option(0.1, "inverse temperature of the preference loss", source=SOURCE, above=0, read_if=FORGETS)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float = option(10.0, "weight of the retain loss (0: none)", source="measured; SAM-NPO: 1", minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source=SOURCE, read_if=KEEPS)


def displacement(options: SAMNPOOptions) -> Displacement:
    """Return where the forget gradient is taken."""
    if options.smoothing == "noise":
        return Noise(sigma=options.sigma, seed=options.noise_seed)
    return Ascent(rho=options.rho)


SAM_NPO = Method(
    name="sam_npo",
    summary="npo with the gradient of F at theta + rho f / |f|, f = grad F (or at theta + noise) + alpha R",
    source=SOURCE,
    options=SAMNPOOptions,
    needs=npo.needs,
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=npo.forget_loss,
    retain_loss=retain_term,
    displacement=displacement,
)
