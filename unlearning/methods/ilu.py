"""ILU (invariant unlearning): NPO, and a penalty where fine-tuning would want to scale the logits.

Loss: J = gamma F + alpha (R + invariance S^2), F and R those of NPO. S = d/dw CE(w z) at w = 1 over the retain answers'
tokens, the mean of E_p[z] - z_y: where it is 0, no common factor of the logits lowers the loss of that data, so that
training on it has less reason to move what was unlearned.
Needs: as NPO, and retain data; a step costs one more forward pass over the retain examples.
Source: invariant LLM unlearning (ILU), arXiv 2506.01339, with the penalty of invariant risk minimisation, arXiv
1907.02893. Differs: the paper takes a data set of its own as the environment, such as GSM8K; here it is the retain
data, to which such a set can be added.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods import npo
from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.terms import RetainLoss, retain_references
from unlearning.objectives import losses
from unlearning.objectives.forward import AnswerLogits, answer_logits
from unlearning.options import FORGETS, option

SOURCE = "ILU 2506.01339"


@dataclass(frozen=True)
class ILUOptions:
    """Options of ILU."""

    invariance: float = option(1.0, "weight of the penalty on the retain data (0: none)", source="measured", minimum=0)
    beta: float = option(
        0.1, "inverse temperature of the preference loss", source=npo.NPO.source, above=0, read_if=FORGETS
    )
    gamma: float = option(1.0, "weight of the forget loss", source=npo.NPO.source, minimum=0)
    alpha: float = option(10.0, "weight of the retain loss and its penalty", source="measured", above=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source=npo.NPO.source)


def slopes(answers: AnswerLogits) -> Float[Tensor, " token"]:
    """Compute d/dw CE(w z) at w = 1 for each token, E_p[z] - z_y, in nats."""
    logits = answers.logits if answers.logits.dtype.itemsize > 4 else answers.logits.float()
    expected = (logits.softmax(-1) * logits).sum(-1)
    return expected - logits.gather(-1, answers.targets[:, None])[:, 0]


@torch.no_grad()
def total_slope(model: PreTrainedModel, batch: Batch, options: ILUOptions) -> tuple[float, float]:
    """Sum the slopes over the retain answers' tokens.

    Args:
        model: The model in training.
        batch: A micro-batch of retain examples.
        options: ILU's options; without a penalty nothing is computed.

    Returns:
        The sum, and the number of tokens.
    """
    assert batch.retain is not None
    if not options.invariance:
        return 0.0, 1.0
    found = slopes(answer_logits(model, batch.retain))
    return found.double().sum().item(), float(len(found))


def retain_loss(model: PreTrainedModel, batch: Batch, options: ILUOptions) -> Float[Tensor, ""]:
    """Compute R + invariance S^2, or a micro-batch's share of it.

    The share 2 S s - S sg(s), S that of the whole step batch and s the micro-batch's part of it, adds up to S^2 and has
    its gradient, however the step batch is split.

    Args:
        model: The model in training.
        batch: A micro-batch of retain examples.
        options: ILU's options.

    Returns:
        The share, in nats.
    """
    assert batch.retain is not None and batch.statistic is not None
    answers = answer_logits(model, batch.retain)
    n_tokens = batch.step_batch.retain_tokens
    if options.retain_loss == "kl":
        assert batch.retain.reference_logits is not None
        loss = losses.token_divergence(answers.logits, batch.retain.reference_logits).sum() / n_tokens
    else:
        loss = losses.pooled_cross_entropy(losses.token_nll(answers.logits, answers.targets), n_tokens)
    if not options.invariance:
        return loss
    share = slopes(answers).sum() / n_tokens
    return loss + options.invariance * batch.statistic * (2 * share - share.detach())


def needs(options: ILUOptions) -> Needs:
    """Return the data, and the quantities of the reference model that the losses read."""
    forget = (Reference("forget", "nll"),) if options.gamma > 0 else ()
    return Needs(retain=True, references=(*forget, *retain_references(options)))


ILU = Method(
    name="ilu",
    summary="npo + alpha invariance S^2, S = d/dw CE(w z) at w = 1 on retain",
    source=SOURCE,
    options=ILUOptions,
    needs=needs,
    needs_note="forget, reference, retain",
    forget_loss=npo.forget_loss,
    retain_loss=retain_loss,
    statistic=total_slope,
    statistic_of="retain",
)
