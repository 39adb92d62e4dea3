"""Layered unlearning: the forget examples are forgotten in folds, one after the other, the later ones kept meanwhile.

Loss: J = gamma F + alpha (R + K). In stage s of S = folds, F is that of NPO over the examples of folds 1 to s, K the
cross-entropy over those of the later folds, R the retain loss. Both F and K are divided by the size of the whole step
batch, so that an example weighs the same in every stage. The stages have equally many steps; an example's fold is the
remainder of its number divided by S.
Needs: as NPO.
Source: Layered Unlearning, arXiv 2505.09500, made so that relearning a part brings the rest back less. Differs: the
paper trains the stages one by one, each from the last one's model as its reference; here they are one training, with
one optimizer and the first model as the reference.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods import npo
from unlearning.methods.method import Batch, Method
from unlearning.methods.recipe import Recipe
from unlearning.methods.terms import RetainLoss, retain_term
from unlearning.objectives import losses
from unlearning.objectives.forward import answer_sequence_nll
from unlearning.options import KEEPS, option

SOURCE = "layered unlearning 2505.09500"


@dataclass(frozen=True)
class LayeredOptions:
    """Options of layered unlearning."""

    folds: int = option(4, "number of folds of the forget set, and of stages", source=SOURCE, minimum=2)
    beta: float = option(0.1, "inverse temperature of the preference loss", source=npo.NPO.source, above=0)
    gamma: float = option(1.0, "weight of the forget loss", source=npo.NPO.source, above=0)
    alpha: float = option(
        10.0, "weight of the retain loss and of the folds that are kept (0: none)", source="measured", minimum=0
    )
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source=npo.NPO.source, read_if=KEEPS)


def forgotten(batch: Batch, folds: int) -> Bool[Tensor, " batch"]:
    """Return which forget examples are to be forgotten in the present stage; the others are to be kept."""
    assert batch.forget is not None and batch.forget.index is not None
    stage = int(batch.step_batch.progress * folds)
    return batch.forget.index % folds <= stage


def forget_loss(model: PreTrainedModel, batch: Batch, options: LayeredOptions) -> Float[Tensor, ""]:
    """Compute F + (alpha / gamma) K, both from one pass over the forget answers."""
    assert batch.forget is not None and batch.forget.reference_nll is not None
    going = forgotten(batch, options.folds)
    nll = answer_sequence_nll(model, batch.forget)
    preference = losses.npo(
        nll[going],
        batch.forget.reference_nll[going],
        beta=options.beta,
        n_sequences=batch.step_batch.forget_sequences,
    )
    kept = nll[~going].sum() / batch.step_batch.forget_tokens
    return preference + options.alpha / options.gamma * kept


LAYERED = Method(
    name="layered",
    summary="npo fold by fold: -(2 gamma / beta) mean log sigmoid(beta (NLL - NLL_ref)) on the folds so far + alpha "
    "(CE of the later folds + R)",
    source=SOURCE,
    options=LayeredOptions,
    needs=npo.needs,
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_term,
    recipe=Recipe(
        learning_rate=4e-4,
        epochs=40,
        steps=320,
        lr_schedule="constant",
        source="four stages of npo's 10 epochs of 32 examples; the rate: measured",
    ),
)
