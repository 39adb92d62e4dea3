"""CE-U: cross-entropy towards the model's own distribution without the forget token."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_logits


@dataclass(frozen=True)
class CEUOptions:
    """No options of its own."""


def forget_loss(model: PreTrainedModel, batch: Batch, _options: CEUOptions) -> Float[Tensor, ""]:
    """F = mean_t CE(sg q_t, p_t), q = p without the token; first answer tokens left out; F >= 0.

    Every answer has at least one token that carries loss, so a window has tokens - sequences others.
    """
    assert batch.forget is not None
    answers = answer_logits(model, batch.forget)
    later = losses.follows_another(answers.sequence)
    n_tokens = batch.window.forget_tokens - batch.window.forget_sequences
    return losses.ce_u(answers.logits[later], answers.targets[later], n_tokens=n_tokens)


CE_U = Method(
    name="ce_u",
    summary="CE(p without the token, p) on forget but for the first token of each answer",
    source="CE-U 2503.01224",
    options=CEUOptions,
    needs=lambda _options: Needs(),
    needs_note="forget",
    forget_loss=forget_loss,
)
