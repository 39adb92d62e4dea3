"""Oracle imitation: the model is drawn to the distributions of a control, a model that never knew the forget answers.

Loss: J = gamma F + alpha R, F = mean_t KL(p_t^control || p_t) over the tokens of the forget answers, and the same mean
over the alternate answers added where they are asked for; R the same over the retain answers.
Needs: a control, forget and retain data, and the control's logits on them.
Source: oracle matching, the idealised unlearning of Distillation Robustifies Unlearning, arXiv 2506.06278, which shows
that a model may behave like one that never knew, and relearn in a few steps. A baseline: who has a control needs no
unlearning. Differs: the paper imitates on the pretraining data; here on the texts that are given.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.recipe import Recipe
from unlearning.methods.terms import forget_divergence, retain_divergence
from unlearning.objectives.forward import answer_divergence
from unlearning.options import FORGETS, option

SOURCE = "oracle matching 2506.06278"


@dataclass(frozen=True)
class OracleOptions:
    """Options of oracle imitation."""

    control: str | None = option(
        None,
        "model that never knew the forget answers, to be imitated: a directory, hub id or built-in name",
        names="model",
        required=True,
    )
    wrong_answers: bool = option(
        False, "imitate it on the alternate answers too, such as wrong answers", source="ours", read_if=FORGETS
    )
    gamma: float = option(1.0, "weight of the divergence on forget answers (0: none)", source="ours", minimum=0)
    alpha: float = option(1.0, "weight of the divergence on retain answers (0: none)", source="ours", minimum=0)


def forget_loss(model: PreTrainedModel, batch: Batch, _options: OracleOptions) -> Float[Tensor, ""]:
    """Compute F = mean_t KL(p_t^control || p_t) over the forget answers, plus that over the alternate answers."""
    loss = forget_divergence(model, batch)
    if batch.alternate is not None:
        loss = loss + answer_divergence(model, batch.alternate).sum() / batch.step_batch.alternate_tokens
    return loss


def needs(options: OracleOptions) -> Needs:
    """Return the data of the losses that have a weight, and the control's logits on them."""
    read = {
        "forget": options.gamma > 0,
        "alternate": options.gamma > 0 and options.wrong_answers,
        "retain": options.alpha > 0,
    }
    return Needs(
        retain=read["retain"],
        alternates=read["alternate"],
        references=tuple(
            Reference(data, "logits", model=options.control) for data in ("forget", "alternate", "retain") if read[data]
        ),
    )


ORACLE = Method(
    name="oracle",
    summary="gamma KL(control, p) on forget + alpha KL(control, p) on retain",
    source=SOURCE,
    options=OracleOptions,
    needs=needs,
    needs_note="a control, forget, alternates if wrong_answers, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_divergence,
    recipe=Recipe(learning_rate=8e-4, steps=300, source="measured"),
)
