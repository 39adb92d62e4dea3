"""SimNPO (simple NPO): NPO without a reference model, on likelihoods per token.

Loss: J = gamma F + alpha R, F = -(2 / beta) mean_b log sigmoid(beta (L_b / n_b - delta)) >= 0.
Needs: forget data; retain data unless alpha = 0; logits of the reference model if retain_loss is kl.
Source: Simplicity Prevails (SimNPO), arXiv 2410.07163.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.terms import RetainLoss, retain_references, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_logits
from unlearning.options import FORGETS, KEEPS, option

SOURCE = "SimNPO 2410.07163, TOFU forget10"


@dataclass(frozen=True)
class SimNPOOptions:
    """Options of SimNPO.

    The paper uses beta 2.5 and gamma 0.1375 on TOFU forget05, and on MUSE beta 0.7 (News) or 0.75 (Books), gamma 1 and
    alpha 0.1.
    """

    beta: float = option(
        1.0,
        "inverse temperature of the preference loss",
        source="measured; SimNPO: 2.5 to 4.5",
        above=0,
        read_if=FORGETS,
    )
    delta: float = option(
        0.0, "margin in nats per token (the paper's gamma is beta times delta)", source=SOURCE, read_if=FORGETS
    )
    gamma: float = option(0.3, "weight of the forget loss", source="measured; SimNPO: 0.125", minimum=0)
    alpha: float = option(1.0, "weight of the retain loss (0: none)", source=SOURCE, minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source=SOURCE, read_if=KEEPS)


def forget_loss(model: PreTrainedModel, batch: Batch, options: SimNPOOptions) -> Float[Tensor, ""]:
    """Compute F = -(2 / beta) mean_b log sigmoid(beta (L_b / n_b - delta)) >= 0."""
    assert batch.forget is not None
    answers = answer_logits(model, batch.forget)
    nll = losses.token_nll(answers.logits, answers.targets)
    return losses.simnpo(
        losses.sequence_mean_nll(nll, answers.sequence, batch.forget.n_sequences),
        beta=options.beta,
        delta=options.delta,
        n_sequences=batch.step_batch.forget_sequences,
    )


SIMNPO = Method(
    name="simnpo",
    summary="-(2 gamma / beta) mean log sigmoid(beta (NLL per token - delta)) + alpha R, R = CE or KL on retain",
    source="SimNPO 2410.07163",
    options=SimNPOOptions,
    needs=lambda options: Needs(retain=options.alpha > 0, references=retain_references(options)),
    needs_note="forget, retain unless alpha=0, reference if retain_loss=kl",
    forget_loss=forget_loss,
    retain_loss=retain_term,
)
