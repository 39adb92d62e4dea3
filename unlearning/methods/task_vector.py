"""Task vector: fine-tune on the forget set, and go as far the other way as the weights went."""

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
    """How far to go.

    MUSE takes the first of 1, 2, 4, 8 and 16 at which what is forgotten scores no better than in a retrained model,
    after 10 epochs at a learning rate of 1e-5 with a cosine schedule, 4 texts a step.
    """

    scaling: float = option(5.0, "times the task vector that is subtracted", source="MUSE 2407.06460, News", above=0)


def forget_loss(model: PreTrainedModel, batch: Batch, _options: TaskVectorOptions) -> Float[Tensor, ""]:
    """CE(forget), descended: the forget set is learned, not forgotten, until `finish`."""
    return forget_cross_entropy(model, batch)


def finish(trained: PreTrainedModel, start: PreTrainedModel, options: TaskVectorOptions) -> None:
    """theta = theta_start - scaling (theta_trained - theta_start), in place of the trained weights."""
    before = start.state_dict()
    trained.load_state_dict(subtract_task_vector(before, trained.state_dict(), before, options.scaling))


TASK_VECTOR = Method(
    name="task_vector",
    summary="descends CE(forget), then theta = start - scaling (theta - start)",
    source="Task Arithmetic 2212.04089",
    options=TaskVectorOptions,
    needs=lambda _options: Needs(),
    needs_note="forget",
    forget_loss=forget_loss,
    finish=finish,
)
