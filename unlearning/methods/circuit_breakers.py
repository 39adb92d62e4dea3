"""Circuit breakers (representation rerouting): hidden states on forget answers turn away from what they were.

Loss: J = gamma (1 - t / 2T) F + alpha (t / 2T) R at step t of T; F = mean_{t, l} ReLU(cos(h_tl, h_tl^ref)) in [0, 1]
over the positions that predict forget answers, R = mean_{t, l} ||h_tl - h_tl^ref|| over all tokens of the retain texts;
h_tl is the output of block l.
Needs: forget data and hidden states of the reference model; retain data unless alpha = 0. The reference's hidden states
take 4 bytes times d_model times the number of blocks per token on disk. Trains the blocks up to the last of them.
Before training both gradients are zero: a cosine of 1 is its maximum. So that rounding does not decide the first step,
normal noise of 1/100 of each weight's own scale is added to it before.
Source: circuit breakers, arXiv 2406.04313. Differs: the paper trains a LoRA adapter (`lora_rank`) and passes texts that
make the model refuse as further retain texts; here all weights train unless an adapter is asked for.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.data.batches import TokenBatch
from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.recipe import Recipe
from unlearning.methods.rmu import MASSIVE_RATIO, output_norms
from unlearning.methods.stages import RunFacts, Settled
from unlearning.objectives.combination import Combination, Schedule
from unlearning.objectives.forward import block_output, blocks, unwrapped
from unlearning.objectives.gradients import norm_of, placed_like
from unlearning.options import option

SOURCE = "circuit breakers 2406.04313"
RETAIN_NORMS = 10.0
"""Weight of the retain loss where distances are measured in mean norms of the hidden states.

F has no unit and R that of the hidden states, whose norm is 1 in one model and 120 in another.
"""

KICK = 0.01
"""Noise on each weight before the first step, relative to the weight's root mean square."""


@dataclass(frozen=True)
class CircuitBreakersOptions:
    """Options of circuit breakers."""

    layers: str | None = option(
        None, "blocks whose outputs are rerouted, from 0, such as 9,19 (none: at 10 and 20 of 32)", source=SOURCE
    )
    gamma: float = option(1.0, "weight of the forget loss at the start", source=SOURCE, minimum=0)
    alpha: float | None = option(
        None,
        f"twice the weight of the retain loss at the end (0: no retain loss; none: {RETAIN_NORMS:g} / mean norm of h)",
        source="measured; circuit breakers: gamma = alpha = 10",
        minimum=0,
    )
    schedule_steps: int | None = option(
        None, "steps over which the weights move (none: those of the run)", source=SOURCE, minimum=1
    )


def indices(options: CircuitBreakersOptions) -> tuple[int, ...]:
    """Return the blocks in rising order.

    Raises:
        InputError: `layers` is not a list of whole numbers.
    """
    assert options.layers is not None  # `with_layers` fills it in
    try:
        return tuple(sorted({int(part) for part in options.layers.split(",")}))
    except ValueError:
        raise InputError(f"`layers` must be whole numbers such as 9,19, got {options.layers}") from None


def with_layers(model: PreTrainedModel, options: CircuitBreakersOptions) -> CircuitBreakersOptions:
    """Return the options with `layers` filled in and checked.

    Raises:
        InputError: The model has no such block.
    """
    n_layers = len(blocks(model))
    if options.layers is None:
        chosen = sorted({max(round(n_layers * part / 32) - 1, 0) for part in (10, 20)})
        return replace(options, layers=",".join(map(str, chosen)))
    for index in indices(options):
        if not 0 <= index < n_layers:
            raise InputError(f"`layers` must be between 0 and {n_layers - 1} for this model, got {index}")
    return options


def with_weights(model: PreTrainedModel, facts: RunFacts, options: CircuitBreakersOptions) -> Settled:
    """Return the options with the retain weight and the number of steps over which the weights move.

    Args:
        model: The model before training.
        facts: The forget texts and the length of the run.
        options: The method's options.

    Returns:
        The options, and a line that says the mean norm if a weight was made of it.
    """
    filled = replace(options, schedule_steps=options.schedule_steps or facts.steps)
    if options.alpha is not None:
        return Settled(filled)
    found = [
        output_norms(model, facts.forget, layer, batch_size=facts.batch_size, massive_ratio=MASSIVE_RATIO)
        for layer in indices(options)
    ]
    mean = sum(norms.mean for norms in found) / len(found)
    alpha = float(f"{RETAIN_NORMS / mean:.3g}")
    line = f"mean norm {mean:.4g} of the outputs of blocks {options.layers} on the forget texts: alpha={alpha:g}"
    return Settled(replace(filled, alpha=alpha), {"mean_norm": mean}, [line])


def retain_weight(options: CircuitBreakersOptions) -> float:
    """Return the weight of the retain loss; 1 where it is not known yet."""
    return 1.0 if options.alpha is None else options.alpha


def trained_parameters(model: PreTrainedModel, options: CircuitBreakersOptions) -> str:
    """Return a pattern of the weights of the blocks up to the last that is rerouted; no other has a gradient."""
    found = blocks(model)
    (prefix,) = (name for name, module in unwrapped(model).named_modules() if module is found)
    below = "|".join(map(str, range(max(indices(options)) + 1)))
    return f"^{re.escape(prefix)}\\.({below})\\."


def kick(parameters: Sequence[tuple[str, Tensor]], _options: CircuitBreakersOptions) -> None:
    """Add normal noise to the weights, in place, which hangs on each weight's name and shape alone.

    A weight that is zero, such as the second matrix of a new adapter, has the scale 1 / sqrt(columns).

    Args:
        parameters: Names and values of the weights that train, whole or sharded.
        _options: Not read.
    """
    for name, parameter in parameters:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        scale = norm_of([parameter]) / parameter.numel() ** 0.5 or parameter.shape[-1] ** -0.5
        parameter.add_(placed_like(drawn, parameter), alpha=KICK * scale)


def forget_loss(model: PreTrainedModel, batch: Batch, options: CircuitBreakersOptions) -> Float[Tensor, ""]:
    """Compute F = mean_{t, l} ReLU(cos(h_tl, h_tl^ref)), over the positions that predict forget answers."""
    assert batch.forget is not None
    ours, theirs = _states(model, batch.forget, options)
    predicts = batch.forget.predicts_answer
    counted = F.pad(predicts, (0, batch.forget.input_ids.shape[1] - predicts.shape[1]))
    rows = counted[batch.forget.attention_mask.bool()]
    cosines = F.cosine_similarity(ours[rows], theirs[rows], dim=-1)
    return cosines.relu().sum() / (batch.step_batch.forget_tokens * ours.shape[1])


def retain_loss(model: PreTrainedModel, batch: Batch, options: CircuitBreakersOptions) -> Float[Tensor, ""]:
    """Compute R = mean_{t, l} ||h_tl - h_tl^ref|| over all tokens of the retain texts; 0 before training."""
    assert batch.retain is not None
    ours, theirs = _states(model, batch.retain, options)
    return (ours - theirs).norm(dim=-1).sum() / (batch.step_batch.retain_positions * ours.shape[1])


def _states(
    model: PreTrainedModel, batch: TokenBatch, options: CircuitBreakersOptions
) -> tuple[Float[Tensor, "token layer d_model"], Float[Tensor, "token layer d_model"]]:
    """Return the hidden states of the model and of the reference model, in float32 or wider."""
    layers = indices(options)
    assert batch.reference_hidden is not None
    ours = block_output(model, batch, layers).unflatten(-1, (len(layers), -1))
    wide = ours if ours.dtype.itemsize > 4 else ours.float()
    return wide, batch.reference_hidden.to(wide).unflatten(-1, (len(layers), -1))


def needs(options: CircuitBreakersOptions) -> Needs:
    """Return both data sets and the hidden states that are compared with."""
    layers = None if options.layers is None else indices(options)
    forget = (Reference("forget", "hidden", layers),) if options.gamma > 0 else ()
    retain = (Reference("retain", "hidden", layers),) if retain_weight(options) > 0 else ()
    return Needs(retain=retain_weight(options) > 0, references=(*forget, *retain))


def combination(options: CircuitBreakersOptions) -> Combination:
    """Return weights that move from the forget loss to the retain loss."""
    return Schedule(gamma=options.gamma, alpha=retain_weight(options), total=options.schedule_steps or 1)


CIRCUIT_BREAKERS = Method(
    name="circuit_breakers",
    summary="gamma (1 - t/2T) mean ReLU(cos(h, h_ref)) on forget answers + alpha (t/2T) mean |h - h_ref| on retain, "
    "h the output of two blocks",
    source=SOURCE,
    options=CircuitBreakersOptions,
    needs=needs,
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    combination=combination,
    trains=trained_parameters,
    resolve=with_layers,
    settle=with_weights,
    start=kick,
    recipe=Recipe(
        learning_rate=2e-3, steps=400, source="measured; circuit breakers: 150 steps with LoRA at 7 billion parameters"
    ),
)
