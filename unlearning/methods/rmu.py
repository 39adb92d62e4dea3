"""RMU (representation misdirection): steer a block's output to a random vector on forget text, keep it on retain text.

Loss: J = gamma F + alpha R, F = mean_{t, i} (h_ti - c u_i)^2 >= 0 over all tokens of the forget texts (u a random unit
vector), R = mean_{t, i} (h_ti - h_ti^ref)^2 >= 0 over all tokens of the retain texts; h is the block's output.
Needs: forget data; retain data and hidden states of the reference model unless alpha = 0. Trains the down projections
of the block and of the two before it.
Source: The WMDP Benchmark (RMU), arXiv 2403.03218, normalised as in its code; c by Adaptive RMU, arXiv 2408.06223.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearning.common.errors import InputError
from unlearning.data.batches import Span, collate
from unlearning.methods.method import Batch, Method, Needs, Reference
from unlearning.methods.recipe import Recipe
from unlearning.methods.stages import RunFacts, Settled
from unlearning.objectives import losses
from unlearning.objectives.combination import WeightedSum
from unlearning.objectives.dropout import without_dropout
from unlearning.objectives.forward import block_output, blocks, unwrapped
from unlearning.options import FORGETS, Condition, option

SOURCE = "RMU 2403.03218, Zephyr-7B"
ADAPTIVE = "Adaptive RMU 2408.06223"
MASSIVE_RATIO = 4.0
"""Tokens whose norm is above this many medians are left out of the mean norm."""
RETAIN_SHARE = 0.35
"""Weight of the retain loss, in units of c^2 / d_model, which is the forget loss of a model far from its target.

Measured: a weight of 30 makes the demo's base (c^2 / d_model = 78) forget and keep the rest, and one of 300 makes
SmolLM2-135M (700) do so; ten times as much leaves either model as it was, a tenth loses more of the rest. It is no law:
the TOFU pair's base (950) needs 30.
"""


_RELATIVE = Condition(
    "gamma is above 0 and steering_coefficient is none",
    lambda options: options.gamma > 0 and options.steering_coefficient is None,
)


@dataclass(frozen=True)
class RMUOptions:
    """Options of RMU.

    The paper steers Zephyr-7B, which has 32 blocks, at block 7, a quarter of the depth. Both losses are means over
    tokens and hidden dimensions; with squared norms instead, alpha would be the same.

    The paper's constant c = 6.5 belongs to Zephyr-7B; hidden states of other models have norms of 100 and more. The
    first token of a text often has a norm many times that of the others, which would rule their mean.
    """

    layer: int | None = option(
        None, "block that is steered, from 0 (none: at a quarter of the depth)", source=SOURCE, minimum=0
    )
    steering_scale: float = option(
        5.0,
        "norm c of the target vector, in mean norms of the block's output on the forget texts",
        source=ADAPTIVE,
        above=0,
        read_if=_RELATIVE,
    )
    massive_ratio: float | None = option(
        MASSIVE_RATIO,
        "leave tokens out of that mean whose norm is above this many medians (none: keep all)",
        above=1,
        read_if=_RELATIVE,
    )
    skip_first_token: bool = option(False, "leave the first token of each text out of that mean", read_if=_RELATIVE)
    steering_coefficient: float | None = option(
        None,
        "norm c itself, such as the paper's 6.5 (none: steering_scale mean norms)",
        source=SOURCE,
        above=0,
        read_if=FORGETS,
    )
    steering_seed: int = option(0, "seed of the direction of the target vector", minimum=0, read_if=FORGETS)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float | None = option(
        None,
        f"weight of the retain loss (0: no retain loss; none: {RETAIN_SHARE} c^2 / d_model)",
        source="measured; Zephyr-7B: 1200",
        minimum=0,
    )


def steering_vector(d_model: int, seed: int) -> Float[Tensor, " d_model"]:
    """Draw the unit vector u: uniform in [0, 1) in each dimension, then normalised.

    Args:
        d_model: Hidden size.
        seed: Seed of the draw, which is made on the CPU so that u is the same on every device.

    Returns:
        Float32, on the CPU.
    """
    drawn = torch.rand(d_model, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def steered_layer(model: PreTrainedModel, layer: int | None) -> int:
    """Return the index of the block that is steered.

    Args:
        model: The model.
        layer: Index of a block, from 0; None chooses the last block of the first quarter of the depth.

    Returns:
        The index of the block.

    Raises:
        InputError: The model has no such block.
    """
    n_layers = len(blocks(model))
    if layer is None:
        return max((n_layers + 2) // 4 - 1, 0)
    if layer >= n_layers:
        raise InputError(f"`layer` must be between 0 and {n_layers - 1} for this model, got {layer}")
    return layer


def with_layer(model: PreTrainedModel, options: RMUOptions) -> RMUOptions:
    """Return the options with `layer` filled in."""
    return replace(options, layer=steered_layer(model, options.layer))


@dataclass(frozen=True)
class Norms:
    """Norms of a block's output at the tokens of the forget texts.

    Attributes:
        mean: Mean over the tokens that count.
        tokens: Number of these tokens.
        left_out: Number of the other tokens.
        largest: Largest norm of all tokens.
    """

    mean: float
    tokens: int
    left_out: int
    largest: float


@torch.no_grad()
def output_norms(
    model: PreTrainedModel,
    spans: Sequence[Span],
    layer: int,
    *,
    batch_size: int,
    massive_ratio: float | None = None,
    skip_first_token: bool = False,
) -> Norms:
    """Measure the norms of a block's output, without padding and without dropout.

    Args:
        model: The model.
        spans: The texts.
        layer: Index of the block, from 0.
        batch_size: Texts per batch.
        massive_ratio: Leave out tokens whose norm is above this many medians of the tokens that count; None keeps all.
        skip_first_token: Leave out the first token of each text.

    Returns:
        The norms, computed in float64.

    Raises:
        InputError: No token is left, or the mean is not a positive number.
    """
    norms, firsts = [], []
    with without_dropout(model):
        for start in range(0, len(spans), batch_size):
            batch = collate(spans[start : start + batch_size]).to(model.device)
            norms.append(block_output(model, batch, layer).double().norm(dim=-1).cpu())
            firsts += [place == 0 for span in spans[start : start + batch_size] for place in range(len(span.input_ids))]
    every = torch.cat(norms)
    kept = every[~torch.tensor(firsts)] if skip_first_token else every
    if not len(kept):
        raise InputError("`skip_first_token` leaves no token: every forget text is one token long. Set it to false.")
    if massive_ratio is not None:
        kept = kept[kept <= massive_ratio * kept.median()]
    mean = kept.mean().item()
    if not 0 < mean < math.inf:
        raise InputError(
            f"`layer` {layer} has outputs of mean norm {mean:g}, which gives RMU no target. Choose another `layer`, or "
            "set `steering_coefficient`."
        )
    return Norms(mean, len(kept), len(every) - len(kept), every.max().item())


def with_coefficient(model: PreTrainedModel, facts: RunFacts, options: RMUOptions) -> Settled:
    """Return the options with the norm c of the target vector, and what it is a multiple of.

    Args:
        model: The model before training.
        facts: The forget texts.
        options: RMU's options.

    Returns:
        The options, a note of the norms, and a line that says c beside the mean norm.
    """
    if not options.gamma:
        return Settled(replace(options, alpha=retain_weight(options)))
    layer = steered_layer(model, options.layer)
    norms = output_norms(
        model,
        facts.forget,
        layer,
        batch_size=facts.batch_size,
        massive_ratio=options.massive_ratio,
        skip_first_token=options.skip_first_token,
    )
    coefficient = options.steering_coefficient or options.steering_scale * norms.mean
    note = {"coefficient": coefficient, "mean_norm": norms.mean, "tokens": norms.tokens, "left_out": norms.left_out}
    line = (
        f"steering to norm {coefficient:.4g}, {coefficient / norms.mean:.3g} times the mean norm {norms.mean:.4g} of "
        f"block {layer}'s output at {norms.tokens} forget tokens ({norms.left_out} left out; the largest norm is "
        f"{norms.largest:.4g})"
    )
    d_model = int(unwrapped(model).config.get_text_config().hidden_size)
    alpha = RETAIN_SHARE * coefficient**2 / d_model if options.alpha is None else options.alpha
    settled = replace(options, steering_coefficient=coefficient, alpha=float(f"{alpha:.3g}"))
    return Settled(settled, {"steering": note}, [line])


def retain_weight(options: RMUOptions) -> float:
    """Return the weight of the retain loss; 1 where it is not known yet."""
    return 1.0 if options.alpha is None else options.alpha


def forget_loss(model: PreTrainedModel, batch: Batch, options: RMUOptions) -> Float[Tensor, ""]:
    """Compute F = mean_{t, i} (h_ti - c u_i)^2 >= 0 over all tokens of the forget texts, prompts included."""
    assert batch.forget is not None
    assert options.steering_coefficient is not None  # `with_coefficient` fills it in
    hidden = block_output(model, batch.forget, steered_layer(model, options.layer))
    target = options.steering_coefficient * steering_vector(hidden.shape[-1], options.steering_seed)
    return losses.rmu(hidden, target.to(hidden.device), n_positions=batch.step_batch.forget_positions)


def retain_loss(model: PreTrainedModel, batch: Batch, options: RMUOptions) -> Float[Tensor, ""]:
    """Compute R = mean_{t, i} (h_ti - h_ti^ref)^2 >= 0 over all tokens of the retain texts; 0 before training."""
    assert batch.retain is not None and batch.retain.reference_hidden is not None
    hidden = block_output(model, batch.retain, steered_layer(model, options.layer))
    return losses.rmu(hidden, batch.retain.reference_hidden, n_positions=batch.step_batch.retain_positions)


def trained_parameters(model: PreTrainedModel, options: RMUOptions) -> str:
    """Return a pattern of the down projections of the steered block and of the two blocks before it.

    Args:
        model: The model.
        options: RMU's options.

    Returns:
        A regular expression of parameter names.

    Raises:
        InputError: The model has no such block, or its down projections were not found.
    """
    layer = steered_layer(model, options.layer)
    found = blocks(model)
    (prefix,) = (name for name, module in unwrapped(model).named_modules() if module is found)
    d_model = int(unwrapped(model).config.get_text_config().hidden_size)
    names = []
    for index in range(max(layer - 2, 0), layer + 1):
        inside = down_projections(found[index], d_model)
        if not inside:
            raise InputError(
                f"the MLP's down projection was not found in layer {index} of {type(unwrapped(model)).__name__}. "
                "Set `train_parameters` to a regular expression of the weights to train."
            )
        names += [f"{prefix}.{index}.{name}.weight" for name in inside]
    return "^(" + "|".join(re.escape(name) for name in names) + ")$"


def down_projections(block: nn.Module, d_model: int) -> list[str]:
    """Find the linear maps of a block's MLP that write to the residual stream.

    They are recognised by their shape, from another width to d_model. If the MLP is as wide as the model, the last
    linear map outside the attention is taken. Experts that are stored as one tensor are not found.

    Args:
        block: A transformer block.
        d_model: Hidden size.

    Returns:
        Module names within the block; empty if none was found.
    """
    into = {name: width_in for name, width_in, width_out in mlp_maps(block) if width_out == d_model}
    widening = [name for name, width in into.items() if width != d_model]
    return widening or list(into)[-1:]


def mlp_maps(block: nn.Module) -> list[tuple[str, int, int]]:
    """Find the linear maps of a block outside its attention.

    Args:
        block: A transformer block.

    Returns:
        Name within the block, width of the input and width of the output of each map; none if experts are stored as
        one tensor.
    """
    if any(parameter.ndim > 2 for parameter in block.parameters()):
        return []
    maps = []
    for name, module in block.named_modules():
        if any("attn" in part or "attention" in part for part in name.lower().split(".")):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            width_in, width_out = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            maps.append((name, width_in, width_out))
    return maps


RMU = Method(
    name="rmu",
    summary="gamma mean (h - c u)^2 on forget + alpha mean (h - h_ref)^2 on retain, h a block's output, "
    "u a random unit vector; trains the down projections of three blocks",
    source="RMU 2403.03218",
    options=RMUOptions,
    needs=lambda options: Needs(
        retain=retain_weight(options) > 0,
        references=(Reference("retain", "hidden", options.layer),) if retain_weight(options) > 0 else (),
    ),
    needs_note="forget, retain and reference unless alpha=0",
    forget_loss=forget_loss,
    retain_loss=retain_loss,
    combination=lambda options: WeightedSum(gamma=options.gamma, alpha=retain_weight(options)),
    trains=trained_parameters,
    resolve=with_layer,
    settle=with_coefficient,
    recipe=Recipe(
        learning_rate=5e-3, steps=600, source="measured; RMU: 5e-5 and 150 steps of 4 texts at 7 billion parameters"
    ),
)
