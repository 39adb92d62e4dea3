"""SURE: NPO on the weights that the forget loss depends on most, at a large learning rate.

Loss: J = gamma F + alpha R, F and R those of NPO. Trains the share of the weight tensors whose gradient of F before
training is longest; the others are frozen.
Needs: as NPO, and one more pass over all forget examples before the first step, with its gradient in memory.
Source: saliency-based unlearning with a large learning rate (SURE), arXiv 2410.16454, made so that forgetting survives
4-bit rounding. Its modules are heads and MLPs above a threshold; here they are weight tensors, by rank.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.common.patterns import searcher
from unlearning.data.batches import Span, collate
from unlearning.methods import npo
from unlearning.methods.method import Method
from unlearning.methods.recipe import Recipe
from unlearning.methods.stages import RunFacts, Settled
from unlearning.methods.terms import RetainLoss, retain_term
from unlearning.objectives.dropout import without_dropout
from unlearning.objectives.forward import answer_sequence_nll, unwrapped
from unlearning.objectives.gradients import GradientAccumulator
from unlearning.options import FORGETS, KEEPS, Condition, option

SOURCE = "SURE 2410.16454"


_RANKED = Condition("salient is none", lambda options: options.salient is None)


@dataclass(frozen=True)
class SUREOptions:
    """Options of SURE."""

    salient_share: float = option(
        0.5,
        "share of the weight tensors that train, those with the longest gradients",
        source="ours",
        above=0,
        maximum=1,
        read_if=_RANKED,
    )
    salient: str | None = option(None, "regular expression of the weights that train (none: that share)")
    beta: float = option(0.1, "inverse temperature of the preference loss", source=SOURCE, above=0, read_if=FORGETS)
    gamma: float = option(1.0, "weight of the forget loss", source=SOURCE, minimum=0)
    alpha: float = option(10.0, "weight of the retain loss (0: none)", source="measured", minimum=0)
    retain_loss: RetainLoss = option("nll", "loss on retain data: nll or kl", source=SOURCE, read_if=KEEPS)


def gradient_norms(model: PreTrainedModel, spans: Sequence[Span], *, batch_size: int) -> dict[str, float]:
    """Measure how much the forget answers depend on each weight tensor.

    Before training, the gradient of NPO's loss is that of mean_b -L_b, whatever beta is; its length is measured here.

    Args:
        model: The model; left without gradients.
        spans: The forget texts.
        batch_size: Texts per batch.

    Returns:
        The norm of mean_b L_b's gradient for each parameter by name; 0 for one that it does not depend on.
    """
    parameters = dict(unwrapped(model).named_parameters())
    asked = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    accumulator = GradientAccumulator(parameters.values())  # bfloat16 gradients are summed in float32
    with without_dropout(model), torch.enable_grad():
        for start in range(0, len(spans), batch_size):
            batch = collate(spans[start : start + batch_size]).to(model.device)
            (answer_sequence_nll(model, batch).sum() / len(spans)).backward()
            accumulator.add()
    gradients = zip(parameters, accumulator.take(), strict=True)
    norms = {name: float(gradient.double().norm()) for name, gradient in gradients}
    for name, parameter in parameters.items():
        parameter.requires_grad_(asked[name])
    return norms


def with_salient(model: PreTrainedModel, facts: RunFacts, options: SUREOptions) -> Settled:
    """Return the options with the expression of the weights that train, and a line that says how many they are.

    Args:
        model: The model before training.
        facts: The forget texts.
        options: SURE's options.

    Returns:
        The options, the norms for the record, and the line.

    Raises:
        InputError: `salient` is no regular expression, or matches no weight; or the weights are quantized.
    """
    if options.salient is not None:
        matches, names = searcher("salient", options.salient), [name for name, _ in model.named_parameters()]
        if not any(map(matches, names)):
            raise InputError(
                f"`salient` must match one of the {len(names)} weights (such as {names[-1]}), got {options.salient!r}"
            )
        return Settled(options)
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise InputError(
            "`base_bits` is not supported by sure, which measures the gradients of the base's weights. Remove "
            "`base_bits`, or set `salient`."
        )
    norms = gradient_norms(model, facts.forget, batch_size=facts.batch_size)
    ranked = sorted(norms, key=lambda name: (-norms[name], name))
    chosen = sorted(ranked[: max(1, round(options.salient_share * len(ranked)))])
    covered = math.sqrt(sum(norms[name] ** 2 for name in chosen) / (sum(norm**2 for norm in norms.values()) or 1.0))
    line = f"salient: {len(chosen)} of {len(norms)} weight tensors, with {covered:.0%} of the gradient's norm"
    return Settled(replace(options, salient="^(" + "|".join(map(re.escape, chosen)) + ")$"), {"norms": norms}, [line])


def trained_parameters(model: PreTrainedModel, options: SUREOptions) -> frozenset[str]:
    """Return the names of the weights that train: of a large model more than an expression may name."""
    assert options.salient is not None  # `with_salient` fills it in, and has checked what the user gave
    matches = searcher("salient", options.salient, length=None)
    return frozenset(name for name, _ in model.named_parameters() if matches(name))


SURE = Method(
    name="sure",
    summary="npo on the share of the weight tensors with the longest gradients of F before training",
    source=SOURCE,
    options=SUREOptions,
    needs=npo.needs,
    needs_note="forget, reference, retain unless alpha=0",
    forget_loss=npo.forget_loss,
    retain_loss=retain_term,
    trains=trained_parameters,
    settle=with_salient,
    recipe=Recipe(learning_rate=1.6e-3, source="10 epochs of 32 examples: open-unlearning; twice npo's rate: ours"),
)
