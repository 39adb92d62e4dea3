"""The gradient-norm attack: the size of the update that a text would cause."""

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
    """Compute the mean over parameter tensors of the L2 norm of the gradient of the mean negative log-likelihood.

    Texts are scored one at a time, without dropout, including the tokens that close them; a member of the training data
    has a small gradient. The model's gradients, its parameters' `requires_grad` and its mode are restored afterwards. A
    tensor that two layers share counts once; a tensor that the loss does not depend on does not count.

    Args:
        subject: The model.
        targets: The texts.
        advance: Called with 1 after each text.

    Returns:
        One norm per text, in the order of the texts.

    Raises:
        InputError: The model has no embedding for a token, or a gradient is not finite.
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
                raise InputError(f"{subject.name}: the gradients must be finite. Evaluate the model in float32.")
            norms.append(norm)
            advance(1)
    return norms


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the model's parameters, all of which require gradients, with the model in evaluation mode."""
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
