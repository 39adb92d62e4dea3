"""LAT (latent adversarial training): NPO while an adversary perturbs the residual stream to bring the answer out.

Loss: J = gamma (F_0 + F_delta) / 2 + alpha R, F and R those of NPO; in F_delta, delta is added to the output of one
block at the prompt's tokens. delta makes the forget answer most probable among all of norm <= radius at every token; it
is searched anew for every example and step, and is a constant of the step. F_0 is needed because a model that knows is
so certain under delta that it has hardly a gradient there.
Needs: as NPO. A step costs attack_steps + 1 more forward and backward passes over the forget examples.
Source: (targeted) latent adversarial training, arXiv 2407.15549. Differs: the paper perturbs several blocks and adds
LAT to other unlearning losses; its code takes steps of Adam, here they have a fixed length along the gradient.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods import npo
from unlearning.methods.method import Batch, Method
from unlearning.methods.recipe import Recipe
from unlearning.methods.rmu import MASSIVE_RATIO, output_norms, steered_layer
from unlearning.methods.stages import RunFacts, Settled
from unlearning.methods.terms import RetainLoss, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_sequence_nll
from unlearning.objectives.perturbation import eliciting, perturbed
from unlearning.options import FORGETS, KEEPS, Condition, option

SOURCE = "LAT 2407.15549"

_RELATIVE = Condition(
    "gamma is above 0 and radius is none", lambda options: options.gamma > 0 and options.radius is None
)


@dataclass(frozen=True)
class LATOptions:
    """Options of LAT."""

    layer: int | None = option(
        None, "block whose output is perturbed, from 0 (none: at a quarter of the depth)", minimum=0, read_if=FORGETS
    )
    radius_scale: float = option(
        0.3,
        "largest norm of the perturbation at a token, in mean norms of the block's output on the forget texts",
        source="ours",
        above=0,
        read_if=_RELATIVE,
    )
    radius: float | None = option(
        None, "that norm itself (none: radius_scale mean norms)", source=SOURCE, above=0, read_if=FORGETS
    )
    attack_steps: int = option(4, "steps of the adversary (LAT: 16)", source="ours", minimum=1, read_if=FORGETS)
    beta: float = option(
        0.1, "inverse temperature of the preference loss", source=npo.NPO.source, above=0, read_if=FORGETS
    )
    gamma: float = option(1.0, "weight of the forget loss", source=npo.NPO.source, minimum=0)
    alpha: float = option(10.0, "weight of the retain loss (0: none)", source="measured", minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source=npo.NPO.source, read_if=KEEPS)


def with_layer(model: PreTrainedModel, options: LATOptions) -> LATOptions:
    """Return the options with `layer` filled in and checked."""
    return replace(options, layer=steered_layer(model, options.layer))


def with_radius(model: PreTrainedModel, facts: RunFacts, options: LATOptions) -> Settled:
    """Return the options with the radius, and a line that says what it is a multiple of.

    Args:
        model: The model before training.
        facts: The forget texts.
        options: LAT's options.

    Returns:
        The options, the mean norm for the record, and the line.
    """
    if not options.gamma or options.radius is not None:
        return Settled(options)
    assert options.layer is not None  # `with_layer` fills it in
    norms = output_norms(model, facts.forget, options.layer, batch_size=facts.batch_size, massive_ratio=MASSIVE_RATIO)
    radius = float(f"{options.radius_scale * norms.mean:.4g}")
    line = f"perturbations of norm {radius:g}; the mean norm of block {options.layer}'s output is {norms.mean:.4g}"
    return Settled(replace(options, radius=radius), {"mean_norm": norms.mean}, [line])


def forget_loss(model: PreTrainedModel, batch: Batch, options: LATOptions) -> Float[Tensor, ""]:
    """Compute F = (F_0 + F_delta) / 2, F_d = -(2 / beta) mean_b log sigmoid(beta (L_b(d) - L_b^ref)) >= 0."""
    assert batch.forget is not None and batch.forget.reference_nll is not None
    assert options.layer is not None and options.radius is not None  # `with_layer` and `with_radius` fill them in
    delta = eliciting(model, batch.forget, options.layer, radius=options.radius, steps=options.attack_steps)
    nll = [answer_sequence_nll(model, batch.forget)]
    with perturbed(model, options.layer, delta):
        nll.append(answer_sequence_nll(model, batch.forget))
    return losses.npo(
        torch.cat(nll),
        batch.forget.reference_nll.repeat(2),
        beta=options.beta,
        n_sequences=2 * batch.step_batch.forget_sequences,
    )


LAT = Method(
    name="lat",
    summary="npo, half of it with delta added to a block's output at the prompt's tokens, |delta| <= radius chosen to "
    "bring the answer out",
    source=SOURCE,
    options=LATOptions,
    needs=npo.needs,
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
    resolve=with_layer,
    settle=with_radius,
    recipe=Recipe(learning_rate=1.6e-3, source="10 epochs of 32 examples: open-unlearning; twice npo's rate: measured"),
)
