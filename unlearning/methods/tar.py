"""TAR (tamper resistance): the forget gradient is taken at weights that an attacker has already trained to remember.

Loss: J = gamma F(theta_k) + alpha R(theta); theta_k are the weights after k steps of Adam on the cross-entropy of the
forget answers, k drawn at every step from 0 to attack_steps. F = -mean_t H(p_t), the entropy of the forget answers'
tokens (forget_loss=entropy), or that of NPO; R as for NPO. First order: the gradient at theta_k is applied to theta.
Needs: forget data; retain data unless alpha = 0; the reference model's losses where NPO or KL reads them. A step costs
attack_steps / 2 more passes on average over the forget examples, a copy of the weights and the attacker's moments.
Source: TAR, arXiv 2408.00761. Differs: the paper starts from a model that has been unlearned, holds out texts for the
attacker and matches hidden states on retain data. Here one training does it, on the forget examples, with R; it learns
to forget at k = 0, since a model that knows an answer has hardly a gradient once the attacker has trained it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.checkpoints.quantized_base import n_parameters
from unlearning.methods import npo
from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.recipe import Recipe
from unlearning.methods.stages import RunFacts, Settled
from unlearning.methods.terms import (
    RetainLoss,
    forget_cross_entropy,
    negative_entropy,
    retain_references,
    retain_term,
)
from unlearning.objectives.displacement import Attack, Displacement
from unlearning.options import FORGETS, KEEPS, Condition, option

SOURCE = "TAR 2408.00761"

_PREFERS = Condition(
    "forget_loss is npo and gamma above 0", lambda options: options.forget_loss == "npo" and options.gamma > 0
)


@dataclass(frozen=True)
class TAROptions:
    """Options of TAR."""

    forget_loss: Literal["entropy", "npo"] = option(
        "entropy", "loss at the attacked weights: entropy or npo", source=SOURCE, read_if=FORGETS
    )
    attack_steps: int = option(4, "most steps of the attacker (TAR: 64)", source="ours", minimum=1, read_if=FORGETS)
    attack_learning_rate: float | None = option(
        None, "the attacker's learning rate (none: that of the recipe for this size)", above=0, read_if=FORGETS
    )
    attack_seed: int = option(0, "seed of the numbers of steps", minimum=0, read_if=FORGETS)
    beta: float = option(0.1, "inverse temperature of npo", source=npo.NPO.source, above=0, read_if=_PREFERS)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float = option(3.0, "weight of the retain loss (0: none)", source="measured; TAR: 1 / 4", minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", read_if=KEEPS)


def forget_loss(model: PreTrainedModel, batch: Batch, options: TAROptions) -> Float[Tensor, ""]:
    """Compute F = -mean_t H(p_t) >= -log V over the forget answers' tokens, in nats, or F of NPO."""
    if options.forget_loss == "npo":
        return npo.forget_loss(model, batch, options)
    return negative_entropy(model, batch)


def needs(options: TAROptions) -> Needs:
    """Return the data, and the quantities of the reference model that the two losses read."""
    forget = (Reference("forget", "nll"),) if options.forget_loss == "npo" and options.gamma > 0 else ()
    return Needs(retain=options.alpha > 0, references=(*forget, *retain_references(options)))


def with_rate(model: PreTrainedModel, _facts: RunFacts, options: TAROptions) -> Settled:
    """Return the options with the attacker's learning rate."""
    if options.attack_learning_rate is not None:
        return Settled(options)
    return Settled(replace(options, attack_learning_rate=Recipe().rate(n_parameters(model))))


def displacement(options: TAROptions) -> Displacement:
    """Return the attack at whose weights the forget gradient is taken."""
    assert options.attack_learning_rate is not None  # `with_rate` fills it in
    return Attack(
        loss=forget_cross_entropy,
        learning_rate=options.attack_learning_rate,
        steps=options.attack_steps,
        seed=options.attack_seed,
    )


TAR = Method(
    name="tar",
    summary="gamma F at the weights after k <= attack_steps steps of relearning + alpha R, F = -mean entropy of the "
    "forget answers or that of npo",
    source=SOURCE,
    options=TAROptions,
    needs=needs,
    needs_note="forget, retain unless alpha=0, reference for npo or kl",
    forget_loss=forget_loss,
    retain_loss=retain_term,
    displacement=displacement,
    settle=with_rate,
)
