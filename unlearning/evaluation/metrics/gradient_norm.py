"""The gradient-norm attack: how much a text would still change the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from unlearning.common.errors import InputError
from unlearning.data.batches import collate
from unlearning.evaluation.subject import Subject
from unlearning.evaluation.token_scores import Target
from unlearning.objectives.forward import answer_nll


def gradient_norms(
    subject: Subject, targets: Sequence[Target], *, advance: Callable[[int], None] = lambda _n: None
) -> list[float]:
    """Mean over parameter tensors of the L2 norm of the gradient of the mean negative log-likelihood.

    One text at a time, without dropout, with the tokens that close it; a member of the training data has a small
    gradient. Gradients that the model holds, whether its parameters take any, and its mode are as they were before.
    A tensor that two layers share counts once; one that the loss does not depend on does not count.

    Args:
        subject: the model.
        targets: the texts.
        advance: called with 1 after each.

    Raises:
        InputError: a token that the model has no embedding for, or a gradient that is not finite.
    """
    subject.check_tokens([target.span.input_ids for target in targets])
    norms = []
    with _differentiable(subject.model) as parameters:
        for target in targets:
            loss = answer_nll(subject.model, collate([target.span]).to(subject.model.device)).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            used = [gradient for gradient in gradients if gradient is not None]
            lengths = [torch.linalg.vector_norm(gradient, dtype=torch.float64).cpu() for gradient in used]
            norm = float(torch.stack(lengths).mean())
            if norm != norm or norm == float("inf"):
                raise InputError(f"{subject.name}: gives gradients that are not finite; evaluate it in float32")
            norms.append(norm)
            advance(1)
    return norms


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The model's parameters, all of which take gradients, of a model without dropout."""
    was_training = {module: module.training for module in model.modules()}
    took = {parameter: parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point()}
    try:
        model.eval()
        for parameter in took:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield list(took)
    finally:
        for parameter, wanted in took.items():
            parameter.requires_grad_(wanted)
        for module, mode in was_training.items():
            module.training = mode
