"""BLUR: remove the retain gradient's component along the forget gradient, and add a share of the forget gradient.

    xi = gamma - <r, f> / ||f||^2        d = r + xi f = gamma f + (r projected off f)

Swapped, the forget gradient yields to the retain gradient: xi = gamma - <r, f> / ||r||^2, d = f + xi r.

f and r are the gradients of forget and retain loss over one whole optimizer step, and theta moves along -d. Whatever r
is, <d, f> = gamma ||f||^2: to first order under plain gradient descent the forget loss falls as if there were no retain
loss. xi is nonlinear in both gradients, so they are summed over all micro-batches and ranks first and combined once; an
average of the micro-batches' own directions would differ. Scaling both losses scales d alike.

Source: BLUR (Bi-Level UnleaRning), arXiv 2506.08164, as its released code has it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from unlearning.objectives.gradients import local, products

Scope = Literal["global", "layer", "tensor"]
Clamp = Literal["none", "nonnegative", "pcgrad"]
First = Literal["forget", "retain"]


@dataclass(frozen=True)
class Report:
    """Diagnostics of one combination, over all parameters and ranks.

    Attributes:
        forget_grad_norm: ||f||.
        retain_grad_norm: ||r||.
        cosine: Cosine of f and r; None if one of them is zero.
        xi: Coefficient of the first gradient in d (f, or r if swapped), averaged over the groups of the scope; None if
            that gradient is zero in every group.
        xi_min: Smallest coefficient of a group.
        xi_max: Largest coefficient of a group.
        forget_progress: <d, f> / ||f||^2, measured on the finished d: gamma in the unclamped global scope. None if f is
            zero, or if swapped.
        retain_progress: The same of r, if swapped.
    """

    forget_grad_norm: float
    retain_grad_norm: float
    cosine: float | None
    xi: float | None
    xi_min: float | None
    xi_max: float | None
    forget_progress: float | None = None
    retain_progress: float | None = None

    def as_logs(self) -> dict[str, float]:
        """Return the values that are not None, for a line of the history; the range of xi only if its ends differ."""
        several = self.xi_min != self.xi_max
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None and (several or name not in ("xi_min", "xi_max"))
        }


def combine(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    *,
    names: Sequence[str],
    gamma: float = 1.0,
    first: First = "forget",
    scope: Scope = "global",
    clamp: Clamp = "none",
    eps: float = 1e-12,
) -> tuple[list[Tensor], Report]:
    """Combine the gradients of forget and retain loss into one direction d = r + xi f, or swapped d = f + xi r.

    d overwrites the gradient that yields, so the other one is the only extra copy that a step holds (4 bytes per
    parameter in float32). Below, f is the gradient that comes first and r the one that yields.

    Args:
        forget: One tensor per parameter, summed over micro-batches and ranks; plain tensors or DTensors.
        retain: Of the same shapes and sharding.
        names: Names of the parameters; the `layer` scope reads the blocks' numbers from them.
        gamma: Multiple of f that every step keeps, whatever r is.
        first: The gradient that comes first; the other is overwritten.
        scope: Parameters over which <r, f> and ||f||^2 are summed: `global`, all parameters (the paper's); `layer`,
            each block, and all parameters outside of blocks as one more group; `tensor`, each parameter.
        clamp: `none`, xi = gamma - <r, f> / ||f||^2 (the paper's);
            `nonnegative`, xi = max(0, gamma - <r, f> / ||f||^2): a retain gradient that lowers the forget loss by more
            than gamma asks for is left unchanged (dynamic barrier descent);
            `pcgrad`, xi = gamma - min(0, <r, f>) / ||f||^2: projected only if the two gradients conflict.
        eps: A group whose ||f|| is at most eps has no direction to project off, and d = r there.

    Returns:
        d, which is the gradient that yields, overwritten, and its diagnostics.
    """
    kept, yielding = (forget, retain) if first == "forget" else (retain, forget)
    groups = _groups(names, scope)
    table = products(kept, yielding)
    coefficients = []
    for group in groups:
        ff, rf, _ = table[group].sum(dim=0).tolist()
        if ff <= eps**2:
            continue
        xi = _coefficient(ff, rf, gamma=gamma, clamp=clamp)
        coefficients.append(xi)
        for index in group:
            local(yielding[index]).add_(local(kept[index]), alpha=xi)
    direction = list(yielding)
    ff, rf, rr = table.sum(dim=0).tolist()
    progress = products(kept, direction).sum(dim=0)[1].item() / ff if ff > eps**2 else None
    if first == "forget":
        return direction, _report(ff, rf, rr, coefficients, forget_progress=progress)
    return direction, _report(rr, rf, ff, coefficients, retain_progress=progress)


def _coefficient(ff: float, rf: float, *, gamma: float, clamp: Clamp) -> float:
    if clamp == "pcgrad":
        return gamma - min(0.0, rf) / ff
    xi = gamma - rf / ff
    return 0.0 if clamp == "nonnegative" and xi < 0 else xi  # `max` would hide a NaN


def _report(ff: float, rf: float, rr: float, coefficients: list[float], **progress: float | None) -> Report:
    return Report(
        forget_grad_norm=math.sqrt(ff),
        retain_grad_norm=math.sqrt(rr),
        cosine=rf / math.sqrt(ff) / math.sqrt(rr) if ff > 0 and rr > 0 else None,
        xi=sum(coefficients) / len(coefficients) if coefficients else None,
        xi_min=min(coefficients, default=None),
        xi_max=max(coefficients, default=None),
        **progress,
    )


_BLOCK = re.compile(r"(?:^|.*?\.)\d+(?=\.|$)")
"""A parameter's name up to its first number, such as `model.layers.3` or `transformer.h.3`."""


def _groups(names: Sequence[str], scope: Scope) -> list[list[int]]:
    """Return the indices of the parameters that share one xi, group by group."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(_group(name, scope), []).append(index)
    return list(found.values())


def _group(name: str, scope: Scope) -> str:
    if scope == "global":
        return ""
    if scope == "tensor":
        return name
    block = _BLOCK.match(name)
    return block.group() if block else ""
