"""CE-U (cross-entropy unlearning): cross-entropy towards the model's own distribution without the forget token.

Loss: J = mean_t CE(sg q_t, p_t) >= 0, q_t = p_t without y_t, renormalised; the first token of each answer is left out.
Needs: forget data.
Source: CE-U, arXiv 2503.01224.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_logits


@dataclass(frozen=True)
class CEUOptions:
    """No options."""


def forget_loss(model: PreTrainedModel, batch: Batch, _options: CEUOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t CE(sg q_t, p_t) >= 0 over all answer tokens but the first of each answer."""
    assert batch.forget is not None
    answers = answer_logits(model, batch.forget)
    later = losses.follows_another(answers.sequence)
    # Every answer has a first token, which is not counted.
    n_tokens = batch.step_batch.forget_tokens - batch.step_batch.forget_sequences
    return losses.ce_u(answers.logits[later], answers.targets[later], n_tokens=n_tokens)


CE_U = Method(
    name="ce_u",
    summary="mean_t CE(p without the token, p) on forget, first token of each answer left out",
    source="CE-U 2503.01224",
    options=CEUOptions,
    needs=lambda _options: Needs(),
    needs_note="forget",
    forget_loss=forget_loss,
)
