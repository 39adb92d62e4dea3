"""Quantized weights: dequantize them on loading, or refuse them by name; never take integers for weights.

A quantized module keeps its scales outside its parameters, where a copy, a hook or a merge can lose them: the model
then computes something else, without an error. So no quantized module leaves this module. Its weights are dequantized
into a plain model of the same class, and everything is computed with those.
"""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from unlearning.checkpoints.headers import Header
from unlearning.checkpoints.keys import Places
from unlearning.checkpoints.locate import UNQUANTIZED
from unlearning.common.errors import InputError

FLOATS = frozenset(("F16", "BF16", "F32", "F64"))
"""Data types of plain weights, as safetensors names them."""

_QUANTIZES = re.compile(
    r"(_scale|_scale_inv|_scale_2|\.scales?|\.SCB|\.weight_format|\.absmax|\.nested_absmax|\.quant_map|"
    r"\.nested_quant_map|\.quant_state\.\w+|\.qweight|\.qzeros|\.g_idx|_packed|_zero_point|_blocks|_scales)$"
)
"""Names of tensors that only a quantized checkpoint has, such as scales."""

_BLOCKS = "_blocks"
"""End of the names of mxfp4's packed numbers; `_scales` is that of their powers of two."""


def check_stored(headers: Mapping[str, Header], method: str | None, path: Path) -> None:
    """Check that the data types on disk are those that the configuration announces.

    Args:
        headers: Header of every tensor on disk, by name.
        method: Quantization method in the configuration; None for plain weights.
        path: Directory of the checkpoint, for messages.

    Raises:
        InputError: The configuration states a quantization, and all tensors are plain; or blocks have no scales.
    """
    if method is not None and all(header.dtype in FLOATS for header in headers.values()):
        raise InputError(
            f"{path}: its config.json says that the weights are quantized ({method}), and none is; remove "
            "quantization_config there"
        )
    alone = [
        name for name in headers if name.endswith(_BLOCKS) and f"{name.removesuffix(_BLOCKS)}_scales" not in headers
    ]
    if method == "mxfp4" and alone:
        raise InputError(f"{path}: the tensor {min(alone)} has no scales beside it; copy the weights again")


def check_places(places: Places, headers: Mapping[str, Header], model: PreTrainedModel, path: Path) -> None:
    """Check that no tensor of integers or of 8-bit floats stands in the place of a parameter.

    Args:
        places: Places of the tensors in the model.
        headers: Header of every tensor on disk, by name.
        model: The model, as its configuration without a quantization describes it.
        path: Directory of the checkpoint, for messages.

    Raises:
        InputError: A parameter is stored as something else than a float of 16 bits or more.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    pairs = [*((name, key) for key, name in places.stored.items()), *places.converted.items()]
    wrong = sorted(name for name, key in pairs if key in parameters and headers[name].dtype not in FLOATS)
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} of its weights are stored as integers or 8-bit floats ({wrong[0]}: "
            f"{headers[wrong[0]].dtype}), and its config.json states no quantization; {UNQUANTIZED}"
        )


def check_factors(headers: Mapping[str, Header], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Check that an adapter's weights are stored as floats of 16 bits or more: no configuration states their scales.

    Args:
        headers: Header of every tensor on disk, by name.
        wanted: The adapter's tensors under their names on disk; those that are no floats may be stored as integers.
        path: Directory of the adapter, for messages.

    Raises:
        InputError: A weight is stored as something else, or there are scales of quantized weights.
    """
    integers = {name for name, tensor in wanted.items() if not tensor.is_floating_point()}
    wrong = sorted(name for name, header in headers.items() if header.dtype not in FLOATS and name not in integers)
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} of the adapter's weights are stored as integers or 8-bit floats ({wrong[0]}: "
            f"{headers[wrong[0]].dtype}), and nothing states their scales; {UNQUANTIZED}"
        )
    _check_no_scales(headers.keys() - wanted.keys(), path)


def check_unexpected(names: Iterable[str], path: Path) -> None:
    """Check that tensors without a place in the model are not the scales of quantized weights or an adapter's.

    Args:
        names: Names of the tensors.
        path: Directory of the checkpoint, for messages.

    Raises:
        InputError: A tensor belongs to quantized weights or to an adapter that was not merged.
    """
    names = sorted(names)
    _check_no_scales(names, path)
    adapters = [name for name in names if ".lora_" in name or ".base_layer." in name]
    if adapters:
        raise InputError(
            f"{path}: holds an adapter that is not merged into its weights ({adapters[0]}); merge it (peft's "
            "merge_and_unload) and save that"
        )


def _check_no_scales(names: Iterable[str], path: Path) -> None:
    scales = sorted(name for name in names if _QUANTIZES.search(name))
    if scales:
        raise InputError(
            f"{path}: its weights are quantized ({scales[0]}), and its configuration does not say how; {UNQUANTIZED}"
        )


def prepare(config: PretrainedConfig, method: str | None) -> None:
    """Set a configuration, in place, so that transformers dequantizes while it loads, where it can.

    Args:
        config: Configuration of the checkpoint.
        method: Quantization method; None for plain weights.
    """
    if method in ("fp8", "mxfp4"):
        config.quantization_config = {**config.quantization_config, "dequantize": True}


@torch.no_grad()
def dequantized(model: PreTrainedModel, dtype: torch.dtype, path: Path) -> PreTrainedModel:
    """Return a plain model of the same class with a loaded model's weights, dequantized.

    Args:
        model: A model that transformers loaded from a quantized checkpoint; it is used up.
        dtype: Dtype of the weights.
        path: Directory of the checkpoint, for messages.

    Returns:
        The model, whose parameters are all plain.

    Raises:
        InputError: The weights cannot be dequantized.
    """
    plain = model
    if getattr(model, "hf_quantizer", None) is not None:
        of_class, verbosity = type(model), transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        in_blocks = {name: _of_blocks(p) for name, p in model.named_parameters() if _breaks_blocks(p)}
        try:
            model = model.dequantize(dtype=dtype)
            for name, values in in_blocks.items():
                model.get_parameter(name).copy_(values)
            config = copy.deepcopy(model.config)
            # Traces of the quantization stay on the dequantized object, so its weights go into a new one.
            plain = of_class.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(f"{path}: its weights cannot be dequantized: {reason}; {UNQUANTIZED}") from None
        finally:
            transformers_logging.set_verbosity(verbosity)
        plain.name_or_path = model.name_or_path
    else:
        vars(plain).pop("_weight_conversions", None)  # saving would undo them: plain values under the packed names
    check_plain(plain, name=str(path))
    wide = {*(plain._keep_in_fp32_modules or ()), *(plain._keep_in_fp32_modules_strict or ())}
    for name, parameter in plain.named_parameters():  # some methods leave weights in the dtype of their scales
        if wide.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return plain


def _breaks_blocks(parameter: Any) -> bool:
    """Return whether a parameter is in 4 bit, and its rows end within blocks of weights that share a scale."""
    state = getattr(parameter, "quant_state", None)
    return state is not None and bool(state.shape[-1] % state.blocksize)


def _of_blocks(parameter: Any) -> Tensor:
    """Dequantize 4-bit weights as one row; of several, bitsandbytes' kernel for AVX-512 takes the wrong scales."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(parameter.quant_state)
    state.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(parameter.data, state).reshape(parameter.quant_state.shape)


def check_plain(model: PreTrainedModel, *, name: str) -> None:
    """Check that a model in memory is not quantized: all its parameters are floats of 16 bits or more.

    Args:
        model: The model.
        name: Name of the model, for messages.

    Raises:
        InputError: The model is quantized.
    """
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    wrong = [key for key, parameter in model.named_parameters() if parameter.dtype not in plain]
    if wrong or getattr(model, "hf_quantizer", None) is not None:
        where = f" ({wrong[0]}: {model.get_parameter(wrong[0]).dtype})" if wrong else ""
        raise InputError(
            f"{name}: the model's weights are quantized{where}; dequantize it (`model.dequantize()`) and save it, "
            "or name its directory"
        )


@contextmanager
def quiet_bitsandbytes() -> Iterator[None]:
    """Silence bitsandbytes, which warns on a CPU of missing 4-bit kernels, within the context."""
    chatty = logging.getLogger("bitsandbytes")
    level = chatty.level
    chatty.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chatty.setLevel(level)
