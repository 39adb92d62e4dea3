"""A frozen base in 8 or 4 bit under an adapter, as in QLoRA (arXiv 2305.14314).

The linear maps of the base are quantized from its float32 weights: to 4 bit by bitsandbytes, as nf4 with double
quantization; to 8 bit with one scale for each row. All else (embeddings, norms, stacked experts) stays as it is. What a
map multiplies with is the value that the bits stand for, in training and in evaluation: bitsandbytes' own 8-bit maps
round their inputs too, on a CPU in evaluation only, and a reference model would not be the one that is trained.

The adapter on disk names the base that was quantized, and its record states the bits: when it is loaded, the base's
weights are rounded to the same values before the merge, so that the loaded model is the trained one.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearning.checkpoints.quantized import quiet_bitsandbytes
from unlearning.common.errors import InputError

Bits = Literal[4, 8]

BLOCK = 64
"""Weights that share a scale in 4 bit. Where a row is no multiple of it, bitsandbytes' CPU kernel mixes scales up."""


@torch.no_grad()
def quantize_base(model: PreTrainedModel, bits: Bits, *, device: torch.device, compute: torch.dtype) -> str:
    """Put quantized linear maps in the place of a model's, and move each to a device.

    Args:
        model: The model in float32, which is changed in place.
        bits: Bits of a weight.
        device: Device of the quantized maps; the rest of the model stays where it is.
        compute: Data type that 4-bit weights are multiplied in; 8-bit ones take that of the input.

    Returns:
        A line that says how many maps are quantized.

    Raises:
        InputError: The model has no linear map that can be quantized, or bitsandbytes is not installed, or fails on
            this device.
    """
    maps = _linear_maps(model)
    chosen = {name: module for name, module in maps.items() if _fits(module, bits)}
    if not chosen:
        rows = f" whose rows are multiples of {BLOCK} numbers" if bits == 4 else ""
        raise InputError(f"`base_bits` {bits} quantizes linear maps{rows}, and the model has none. Remove `base_bits`.")
    for name, module in chosen.items():
        layer = _quantized(name, module, bits, device=device, compute=compute)
        layer.bias = module.bias
        model.set_submodule(name, layer.to(device).train(module.training))
    left = f"; the rows of the others are no multiples of {BLOCK}" if len(chosen) < len(maps) else ""
    return f"base: {len(chosen)} of {len(maps)} linear maps in {bits} bit{left}"


@torch.no_grad()
def round_to_bits(model: PreTrainedModel, bits: Bits) -> None:
    """Round the weights of a model's linear maps, in place, to the values that `quantize_base` keeps.

    Args:
        model: The model in float32, on the CPU.
        bits: Bits of a weight.

    Raises:
        InputError: bitsandbytes is not installed, or fails on this machine.
    """
    for name, module in _linear_maps(model).items():
        if _fits(module, bits):
            values = _values(_quantized(name, module, bits, device=torch.device("cpu"), compute=torch.float32))
            module.weight.copy_(values.T if isinstance(module, Conv1D) else values)


def n_parameters(model: PreTrainedModel) -> int:
    """Return the number of parameters; two in 4 bit are stored as one number."""
    return sum(_size(parameter)[0] for parameter in model.parameters())


def n_bytes(model: PreTrainedModel) -> int:
    """Return the memory of the parameters in bytes, with the scales of quantized ones."""
    return sum(_size(parameter)[1] for parameter in model.parameters())


class Linear8bit(nn.Linear):
    """A frozen linear map with weights of 8 bit, and for each row the step from one value to the next.

    Args:
        weight: The weights, float32 [out, in].
    """

    steps: Tensor  # float32 [out, 1]; no buffer, which would be rounded with the model

    def __init__(self, weight: Tensor) -> None:
        """Quantize the weights."""
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.steps = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        self.weight = nn.Parameter((weight / self.steps).round().to(torch.int8), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.steps = self.steps.to(self.weight.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Multiply with the values that the weights stand for, and add the bias."""
        product: Tensor = _Multiply.apply(input, self.weight, self.steps)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Multiply(torch.autograd.Function):
    """x W^T with weights that are dequantized anew in the backward pass, so that no graph keeps them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, steps: Tensor) -> Tensor:
        """Return x W^T."""
        ctx.save_for_backward(weight, steps)
        return F.linear(x, _dequantized(weight, steps, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        (gradient,) = gradients
        weight, steps = ctx.saved_tensors
        return gradient @ _dequantized(weight, steps, gradient.dtype), None, None


def _dequantized(weight: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * steps).to(dtype)


def _quantized(name: str, module: Any, bits: Bits, *, device: torch.device, compute: torch.dtype) -> Any:
    """Return a linear map with a module's weights on a device, quantized, and without its bias."""
    weight = _matrix(module).to(device)
    if bits == 8:
        return Linear8bit(weight)
    try:
        with quiet_bitsandbytes():
            from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        raise InputError("`base_bits` 4 needs bitsandbytes. Run: pip install bitsandbytes") from None
    n_out, n_in = weight.shape
    layer: Any = Linear4bit(n_in, n_out, compute_dtype=compute, quant_type="nf4", device="meta")
    quantizing: Any = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = quantizing.to(device)
    layer.support_avx512bf16_for_cpu = False  # a kernel for evaluation only, with coarser scales
    _check(name, weight, _values(layer))
    return layer


def _values(layer: Any) -> Tensor:
    """Return the values of a quantized map's weights, float32 [out, in]."""
    if isinstance(layer, Linear8bit):
        return _dequantized(layer.weight, layer.steps, torch.float32)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _check(name: str, weight: Tensor, values: Tensor) -> None:
    """Check that the values of 4-bit weights are as near to the weights as they can be.

    The widest gap of nf4 is 0.304 of a block's largest value, which is itself rounded to 8 bit.

    Args:
        name: Name of the map, for messages.
        weight: The weights, [out, in].
        values: The quantized weights' values.

    Raises:
        InputError: A value is further away.
    """
    largest = weight.reshape(-1, BLOCK).abs().amax(1, keepdim=True)
    allowed = 0.16 * largest + 0.02 * largest.max()
    if not ((values - weight).reshape(-1, BLOCK).abs() <= allowed).all():
        raise InputError(
            f"`base_bits` 4 is not supported for this model on {weight.device.type}: bitsandbytes "
            f"{version('bitsandbytes')} gives other values back than the weights of {name}. Set `base_bits` 8."
        )


def _size(parameter: Any) -> tuple[int, int]:
    """Return the number of weights of a parameter, and their bytes with those of their scales."""
    if state := getattr(parameter, "quant_state", None):
        return state.shape.numel(), parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    scales = 4 * len(parameter) if parameter.dtype == torch.int8 else 0
    return parameter.numel(), parameter.nbytes + scales


def _linear_maps(model: PreTrainedModel) -> dict[str, Any]:
    """Return the linear maps by name, without the output embedding, which no adapter changes by default either."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and module is not head
    }


def _fits(module: Any, bits: Bits) -> bool:
    return bits == 8 or _matrix(module).shape[1] % BLOCK == 0


def _matrix(module: Any) -> Tensor:
    """Return a map's weights, [out, in]."""
    weight: Tensor = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight
