"""Fine-tuning for attacks: Adam with steps relative to the size of each tensor.

    g = scale * gradient                                            (gradient with respect to p / scale)
    m = .9 m + .1 g        v = .999 v + .001 g^2                    (both corrected for their start at zero)
    p = p - rate * scale * m / (sqrt(v) + EPS * largest)            (Adam, Kingma and Ba, 1412.6980)

`scale` is the size of the tensor before training, and `largest` the largest root mean square of sqrt(v) of any tensor.
A rewriting of the model that multiplies a tensor by a factor divides its gradient by it. All of the above but p and
`scale` is then unchanged, so the rewritten model takes the same steps: an attack's strength does not depend on how
weights are written. With a learning rate in the units of the weights, it does.

A tensor of two or more dimensions has its own root mean square as scale. A bias or the gain of a norm has that of its
module's output: a bias of zeros has no size of its own, and how large a bias can be before it matters depends on what
it is added to.

The same `largest` is used for all tensors, because a tensor whose gradient is mathematically zero (a key bias without
rotary positions) has gradients of rounding noise. Compared with itself, noise would take full steps.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from dissect.models.model import Model
from dissect.stress.core.case import Case
from unlearning import Example
from unlearning.common.errors import InputError, check_at_least
from unlearning.data.batches import collate
from unlearning.data.encoding import encode
from unlearning.data.spans import AnswerSpan
from unlearning.objectives.forward import answer_nll

EPS = 1e-6
"""Gradient, as a share of the largest tensor's, that takes half a step."""

BETAS = (0.9, 0.999)
"""Decay of the averages of the gradient and of its square, per step."""

MEASURED = 64
"""Maximum number of taught examples on which the loss before and after training is measured."""

MAX_LENGTH = 512
"""Maximum number of tokens of a text; longer documents are cut into pieces, longer answers at their end."""

_SIZED = 8
"""Number of texts on which outputs of modules are measured."""


@dataclass(frozen=True)
class Recipe:
    """One strength of fine-tuning.

    Attributes:
        rate: Size of a step, as a share of the size of each tensor; the same for every step.
        steps: Number of steps.
        batch_size: Number of texts per step.
        lora_rank: Rank of an adapter that is trained instead of the weights; 0 trains the weights.

    Examples:
        >>> from dissect.stress.core.finetuning import Recipe
        >>> Recipe(rate=0.01).variant
        'rate 0.01'
    """

    rate: float = 0.01
    steps: int = 24
    batch_size: int = 20
    lora_rank: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.rate > 0:
            raise InputError(f"`rate` must be above 0, got {self.rate}")
        check_at_least("steps", self.steps, 1)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("lora_rank", self.lora_rank, 0)

    @property
    def variant(self) -> str:
        """Name of the recipe in tables."""
        return f"rate {self.rate:.2g}" + (f", lora {self.lora_rank}" if self.lora_rank else "")


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A fine-tuned model, and how its training went.

    Attributes:
        model: The fine-tuned copy, in float32.
        losses: Loss of each step's texts before the step, in nats per answer token.
        loss_before: Loss of the taught examples (at most `MEASURED`, evenly spaced) before training, in the same unit.
        loss_after: Their loss after training.
    """

    model: Model
    losses: Float[np.ndarray, " step"]
    loss_before: float
    loss_after: float


def check_recipes(recipes: Sequence[Recipe]) -> None:
    """Check that an attack has recipes, and that their names differ.

    Args:
        recipes: Strengths of the attack.

    Raises:
        InputError: There is no recipe, or two have the same name.
    """
    if not recipes or len({recipe.variant for recipe in recipes}) < len(recipes):
        raise InputError("`recipes` must not be empty, and each must have another rate or adapter")


def fine_tuned(model: Model, examples: Sequence[Example], recipe: Recipe, *, case: Case) -> FineTuned:
    """Return a copy of the model after fine-tuning on answers.

    Args:
        model: The model; it is not changed.
        examples: Questions and answers to train on.
        recipe: Strength of the training.
        case: Models and facts; gives tokenizer, chat template, and the seed of the order of the examples.

    Returns:
        The fine-tuned model with its losses. Losses that are not finite mean that the training diverged.

    Raises:
        InputError: There is no example with an answer.
    """
    *_, (_, found) = fine_tuned_at(model, examples, recipe, steps=[recipe.steps], case=case)
    return found


def fine_tuned_at(
    model: Model, examples: Sequence[Example], recipe: Recipe, *, steps: Sequence[int] = (2, 4, 8), case: Case
) -> Iterator[tuple[int, FineTuned]]:
    """Yield copies of the model after increasing numbers of steps of one training.

    Args:
        model: The model; it is not changed.
        examples: Questions and answers to train on.
        recipe: Strength of the training; its `steps` are not used.
        steps: Increasing numbers of steps.
        case: Models and facts; gives tokenizer, chat template, and the seed of the order of the examples.

    Yields:
        Each number of steps with the model after it: the same as `fine_tuned` gives for this number.

    Raises:
        InputError: There is no example with an answer, or the numbers do not increase from 1 or more.
    """
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise InputError(f"`steps` must be increasing numbers from 1, got {', '.join(map(str, steps)) or 'none'}")
    spans = spans_of(model, examples, case)
    hf = copy.deepcopy(model.hf).float().requires_grad_(True).eval()
    before = mean_loss(hf, spans)
    if recipe.lora_rank:
        tensors = _adapters(hf, recipe.lora_rank, seed=case.seed)
        scales = [1.0] * len(tensors)
    else:
        tensors = list(hf.parameters())  # tied ones once
        scales = scales_of(hf, spans)
    descent = Descent(tensors, scales, recipe.rate)
    losses: list[Tensor] = []
    for batch in _batches(spans, recipe.batch_size, steps[-1], seed=case.seed):
        loss = answer_nll(hf, collate(batch).to(model.device)).mean()
        descent.step(torch.autograd.grad(loss, tensors, allow_unused=True))
        losses.append(loss.detach())
        if len(losses) in steps:
            last = len(losses) == steps[-1]
            trained = _merged(hf, model) if recipe.lora_rank else hf if last else copy.deepcopy(hf)
            yield (
                len(losses),
                FineTuned(
                    model=replace(model, hf=trained, sha256=f"{model.sha256} fine-tuned"),
                    losses=torch.stack(losses).double().cpu().numpy(),
                    loss_before=before,
                    loss_after=mean_loss(trained, spans),
                ),
            )


@torch.no_grad()
def mean_loss(hf: PreTrainedModel, spans: Sequence[AnswerSpan]) -> float:
    """Return the mean loss of the answers' tokens, in nats, over at most `MEASURED` of the texts, evenly spaced."""
    indices = np.unique(np.linspace(0, len(spans) - 1, MEASURED).round().astype(int))
    device = next(hf.parameters()).device
    measured = sorted((spans[index] for index in indices), key=lambda span: len(span.input_ids))
    nll = [answer_nll(hf, collate(measured[at : at + 32]).to(device)) for at in range(0, len(measured), 32)]
    return float(torch.cat(nll).double().mean())


class Descent:
    """Adam with relative steps, as the module's docstring has it."""

    def __init__(self, tensors: Sequence[Tensor], scales: Sequence[float], rate: float) -> None:
        """Start from averages of zero.

        Args:
            tensors: What to train; changed in place.
            scales: Size of each tensor, as `scales_of` returns it.
            rate: Size of a step, as a share of the size of each tensor.
        """
        self.tensors, self.scales, self.rate = tensors, scales, rate
        self.means = [torch.zeros_like(tensor) for tensor in tensors]
        self.squares = [torch.zeros_like(tensor) for tensor in tensors]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Take one step along the gradients, one per tensor; None for a tensor that the loss does not depend on."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for gradient, scale, mean, square in zip(gradients, self.scales, self.means, self.squares, strict=True):
            if gradient is None:  # a parameter that these texts do not use, such as an expert
                gradient = torch.zeros_like(mean)
            relative = gradient * scale
            mean.lerp_(relative, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(relative, relative, value=1 - BETAS[1])
        device = self.squares[0].device
        largest = torch.stack([square.mean().to(device) for square in self.squares]).max().div(second).sqrt()
        for tensor, scale, mean, square in zip(self.tensors, self.scales, self.means, self.squares, strict=True):
            denominator = (square / second).sqrt_().add_(EPS * largest.to(square.device))
            tensor.addcdiv_(mean, denominator, value=-self.rate * scale / first)


def spans_of(model: Model, examples: Sequence[Example], case: Case) -> list[AnswerSpan]:
    """Return the tokens of the examples, wrapped as the case's questions are."""
    tokenizer = case.pair.tokenizer
    return encode(
        tokenizer,
        examples,
        append_eos=tokenizer.eos_token_id is not None,
        max_length=min(MAX_LENGTH, model.context),
        too_long="cut",
        chat=case.forget.prompts.chat,
    ).spans


def _batches(spans: Sequence[AnswerSpan], size: int, steps: int, *, seed: int) -> Iterator[list[AnswerSpan]]:
    """Yield batches from seeded permutations of the texts, one after the other; all texts if they are fewer."""
    size = min(size, len(spans))
    drawn = np.random.default_rng(seed)
    order = np.concatenate([drawn.permutation(len(spans)) for _ in range(-(-size * steps // len(spans)))])
    for step in range(steps):
        yield [spans[index] for index in order[step * size : (step + 1) * size]]


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


def scales_of(hf: PreTrainedModel, spans: Sequence[AnswerSpan]) -> list[float]:
    """Return the size of every parameter: its root mean square, or of a vector that of its module's output."""
    of_outputs = _output_sizes(hf, spans)
    vectors = {
        id(vector): size
        for module, size in of_outputs.items()
        for vector in module.parameters(recurse=False)
        if vector.dim() == 1
    }
    return [vectors.get(id(parameter)) or _rms(parameter) for parameter in hf.parameters()]


@torch.no_grad()
def _output_sizes(hf: PreTrainedModel, spans: Sequence[AnswerSpan]) -> dict[nn.Module, float]:
    """Return the root mean square of the outputs of modules that have a vector as parameter, over tokens of the texts.

    The texts are run one by one, so that no padding counts.
    """
    squares: dict[nn.Module, list[float]] = {}

    def measure(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            squares.setdefault(module, []).append(_rms(output) ** 2)

    handles = [
        module.register_forward_hook(measure)
        for module in hf.modules()
        if any(parameter.dim() == 1 for parameter in module.parameters(recurse=False))
    ]
    device = next(hf.parameters()).device
    try:
        for index in np.unique(np.linspace(0, len(spans) - 1, _SIZED).round().astype(int)):
            answer_nll(hf, collate([spans[index]]).to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {module: float(np.mean(values)) ** 0.5 for module, values in squares.items()}


class _LowRank(nn.Module):
    """W + RMS(W) B A / sqrt(rank), with A of normal deviates and B of zeros before training (LoRA, 2106.09685).

    A step changes every entry of the product by about `rate` times RMS(W), as training the weights does.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator).to(weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.size = _rms(weight) / rank**0.5

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.size * (self.b @ self.a)


def _adapters(hf: PreTrainedModel, rank: int, *, seed: int) -> list[Tensor]:
    """Put adapters on all matrices of the model but those of embeddings and output; return what they train."""
    generator = torch.Generator().manual_seed(seed)
    outside = (hf.get_input_embeddings(), hf.get_output_embeddings())
    hf.requires_grad_(False)
    found: list[Tensor] = []
    for module in list(hf.modules()):
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or module in outside or isinstance(module, nn.Embedding):
            continue
        adapter = _LowRank(weight, rank, generator)
        parametrize.register_parametrization(module, "weight", adapter)
        found += [adapter.a, adapter.b]
    return found


@torch.no_grad()
def _merged(hf: PreTrainedModel, model: Model) -> PreTrainedModel:
    """Return a copy of the model that `hf` was made from, with the adapters of `hf` added to its weights."""
    merged = copy.deepcopy(model.hf).float().eval()
    for name, module in hf.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            merged.get_parameter(f"{name}.weight").copy_(module.weight)
    return merged
