"""Quantisation: rounding undoes changes that are smaller than the step between two codes (2410.16454).

A method that may cost no utility moves weights only little. Rounded to 8 or 4 bits, many weights get the same code as
the base's, and what was unlearned is back. Rounding adds no information: it uses one model's weights and no data.

The weight of every linear layer except the head is rounded by bitsandbytes with its own defaults, and replaced by the
numbers that the codes stand for, so that everything else runs as with any weights (weight-only quantisation;
activations are not rounded):

    int8    per output row: round(127 w / max|w|), of the float16 weight as LLM.int8() takes it (2208.07339)
    nf4     per block of 64: the nearest of 16 normal quantiles times max|w| (2305.14314); OpenUnlearning's choice
    fp4     per block of 64: the nearest 4-bit float times max|w|; bitsandbytes' default, and the paper's choice
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.stress.core.case import Case
from dissect.stress.core.result import PLAIN, StressResult, fact_rows
from dissect.stress.core.scores import MEASURES, FactScores, score_facts
from unlearning.common.errors import InputError

SCHEMES = ("int8", "nf4", "fp4")
"""The available roundings of weights."""

BLOCK = 64
"""Number of weights that share a scale in `nf4` and `fp4`."""

PROVES = (
    "rho > 0: rounding alone, which adds no information, uncovers what the weights still hold. rho = 0 shows "
    "little: changes larger than a rounding step survive it, whether the facts are erased or not."
)


@dataclass(frozen=True, eq=False)
class Quantised:
    """One rounded weight; both arrays have the weight's shape.

    Attributes:
        codes: The code's entry in its code book, between -1 and 1; equal exactly where the codes are equal.
        values: The numbers that the codes stand for, in the weight's dtype.
    """

    codes: Float[Tensor, "out_features in_features"]
    values: Float[Tensor, "out_features in_features"]


def quantisation(case: Case, *, schemes: Sequence[str] = SCHEMES) -> StressResult:
    """Round the weights of every model; one variant per scheme.

    Args:
        case: Models and facts.
        schemes: Some of `SCHEMES`.

    Returns:
        The result of the test `quantisation`, with the table `codes`: `role`, `variant`, `n_weights` and `same_code`,
        the share of the weights whose code equals the base's.

    Raises:
        InputError: There is no scheme or an unknown one, or bitsandbytes is not installed.
    """
    started = time.perf_counter()
    check_schemes(schemes)
    scored: list[tuple[str, str, FactScores]] = []
    counts = []
    for role, model in case.models.items():
        scored.append((role, PLAIN, score_facts(model, case.forget, batch_size=case.batch_size)))
        for scheme in schemes:
            rounded = quantised_model(model, scheme)
            scored.append((role, scheme, score_facts(rounded, case.forget, batch_size=case.batch_size)))
            if role != "base":
                same, total = same_codes(case.pair.base, model, scheme)
                counts.append({"role": role, "variant": scheme, "n_weights": total, "same_code": same / total})
    return StressResult(
        test="quantisation",
        level=4,
        measure=MEASURES[0],
        frame=fact_rows(case.forget, scored),
        proves=PROVES,
        settings={"schemes": list(schemes)},
        seconds=time.perf_counter() - started,
        seed=case.seed,
        tables={"codes": pd.DataFrame(counts)},
    )


def check_schemes(schemes: Sequence[str]) -> None:
    """Check that the schemes are available.

    Raises:
        InputError: There is no scheme or an unknown one, or bitsandbytes is not installed.
    """
    unknown = [scheme for scheme in schemes if scheme not in SCHEMES]
    if unknown or not schemes:
        raise InputError(f"`schemes` must be some of {', '.join(SCHEMES)}, got {', '.join(schemes) or 'none'}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise InputError(
            "quantisation needs bitsandbytes, which is not installed: pip install 'dissect-unlearning[optimizers]'"
        ) from None


@torch.no_grad()
def quantised_model(model: Model, scheme: str) -> Model:
    """Round the model's linear weights, except those of head and embeddings.

    Args:
        model: The model; it is not changed.
        scheme: One of `SCHEMES`.

    Returns:
        The rounded model.
    """
    values = {name: _quantise_stored(stored, scheme).values for name, stored in _linear_weights(model)}
    return replace(model, hf=with_values(model.hf, values), sha256=f"{model.sha256} {scheme}")


@torch.no_grad()
def same_codes(base: Model, other: Model, scheme: str) -> tuple[int, int]:
    """Count the linear weights of two models that get the same code.

    Args:
        base: The first model.
        other: The second model.
        scheme: One of `SCHEMES`.

    Returns:
        The number of weights with the same code, and the number of all weights.
    """
    same = total = 0
    others: Mapping[str, nn.Module] = dict(_linear_weights(other))
    for name, stored in _linear_weights(base):
        ours, theirs = (_quantise_stored(each, scheme).codes for each in (stored, others[name]))
        same += int((ours == theirs.to(ours.device)).sum())
        total += ours.numel()
    return same, total


def quantise(weight: Float[Tensor, "out_features in_features"], scheme: str) -> Quantised:
    """Round one weight.

    Args:
        weight: The weight, with outputs as rows.
        scheme: One of `SCHEMES`; see the module's docstring.

    Returns:
        The codes and the rounded weight.
    """
    from bitsandbytes import functional

    if scheme == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        values = functional.int8_vectorwise_dequant(codes, largest)
        return Quantised(codes.float() / 127, values.to(weight.dtype))
    # The weight is flattened and padded to whole blocks: on a CPU, bitsandbytes 0.50 starts a new block at every row
    # when it reads codes, but not when it writes them, and would use the wrong scale for rows that are no multiple of
    # the block.
    flat = nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK))
    packed, state = functional.quantize_4bit(flat, blocksize=BLOCK, quant_type=scheme)
    values = functional.dequantize_4bit(packed, state).flatten()[: weight.numel()].view_as(weight)
    # A byte holds two codes, the first one in its upper half.
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight.numel()]
    return Quantised(state.code[nibbles.long()].view_as(weight), values.to(weight.dtype))


def _linear_weights(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Yield the linear layers by their weight's name, except the head, which may be tied to the embeddings."""
    head = model.hf.get_output_embeddings()
    for path, module in model.hf.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield f"{path}.weight", module


def _quantise_stored(module: nn.Module, scheme: str) -> Quantised:
    """Round a layer's weight in its stored shape; Conv1D stores outputs as columns and is rounded as a linear layer."""
    weight = module.get_parameter("weight").detach()
    if not isinstance(module, Conv1D):
        return quantise(weight, scheme)
    turned = quantise(weight.T, scheme)
    return Quantised(turned.codes.T, turned.values.T)
