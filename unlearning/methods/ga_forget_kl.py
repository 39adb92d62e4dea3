"""GA + forget KL: gradient ascent on the forget answers, held back by the KL divergence on the same answers.

Loss: J = -CE(forget) + kl_weight mean_t KL(reference || model), both over the forget answer tokens; unbounded below.
Needs: forget data, logits of the reference model.
Source: a baseline of Negative Preference Optimization, arXiv 2404.05868 (`grad_ascent_forgetKL` in its code, which
averages the divergence over prompts and padding as well).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_logits
from unlearning.options import option

SOURCE = "NPO 2404.05868"


@dataclass(frozen=True)
class GAForgetKLOptions:
    """Options of GA + forget KL."""

    kl_weight: float = option(
        1.0, "weight of the KL divergence on the forget answers (0: ga)", source=SOURCE, minimum=0
    )


def forget_loss(model: PreTrainedModel, batch: Batch, options: GAForgetKLOptions) -> Float[Tensor, ""]:
    """Compute F = -CE(forget) + kl_weight mean_t KL(reference || model), both from one pass over the forget answers."""
    assert batch.forget is not None and batch.forget.reference_logits is not None
    answers = answer_logits(model, batch.forget)
    nll = losses.token_nll(answers.logits, answers.targets)
    divergence = losses.token_divergence(answers.logits, batch.forget.reference_logits)
    n_tokens = batch.step_batch.forget_tokens
    return (options.kl_weight * divergence.sum() - nll.sum()) / n_tokens


GA_FORGET_KL = Method(
    name="ga_forget_kl",
    summary="-CE(forget) + kl_weight KL(reference || model) on forget",
    source=SOURCE,
    options=GAForgetKLOptions,
    needs=lambda _options: Needs(references=(Reference("forget", "logits"),)),
    needs_note="forget, reference",
    forget_loss=forget_loss,
)
