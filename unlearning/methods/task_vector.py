"""Task vector: fine-tune on the forget set, then move the weights in the opposite direction.

Loss: J = CE(forget) >= 0, minimised: the forget set is learned first. After the last step
theta = theta_ref - scaling (theta_trained - theta_ref).
Needs: forget data, weights of the reference model.
Source: Editing Models with Task Arithmetic, arXiv 2212.04089, in the form of MUSE, arXiv 2407.06460.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.methods.method import Batch, Method, Needs
from unlearning.methods.task_arithmetic import subtract_task_vector
from unlearning.methods.terms import forget_cross_entropy
from unlearning.options import option


@dataclass(frozen=True)
class TaskVectorOptions:
    """Options of the task vector.

    MUSE trains 10 epochs with learning rate 1e-5, a cosine schedule and 4 texts per step, and uses the first scaling of
    1, 2, 4, 8 and 16 at which the model scores no better on the forget set than a retrained model.
    """

    scaling: float = option(
        5.0, "factor of the task vector that is subtracted", source="MUSE 2407.06460, News", above=0
    )


def forget_loss(model: PreTrainedModel, batch: Batch, _options: TaskVectorOptions) -> Float[Tensor, ""]:
    """Compute F = CE(forget) >= 0: the forget set is learned until `finish` subtracts what was learned."""
    return forget_cross_entropy(model, batch)


def finish(trained: PreTrainedModel, reference: PreTrainedModel, options: TaskVectorOptions) -> None:
    """Replace the trained weights by theta_ref - scaling (theta_trained - theta_ref)."""
    before = reference.state_dict()
    trained.load_state_dict(subtract_task_vector(before, trained.state_dict(), before, options.scaling))


TASK_VECTOR = Method(
    name="task_vector",
    summary="minimises CE(forget), then theta = theta_ref - scaling (theta - theta_ref)",
    source="Task Arithmetic 2212.04089",
    options=TaskVectorOptions,
    needs=lambda _options: Needs(),
    needs_note="forget",
    forget_loss=forget_loss,
    finish=finish,
)
