"""Load the model and the tokenizer of a checkpoint's directory, or refuse in one line what is broken."""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from unlearning.checkpoints.locate import base_of, check_files, is_adapter, weights_directory
from unlearning.checkpoints.lora import merge_adapter, require_peft
from unlearning.common.errors import InputError


def load_weights(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    The default is float32, whatever the checkpoint's dtype: a CPU multiplies bfloat16 a hundred times slower, and
    training updates at learning rates of 1e-5 are below bfloat16's resolution of most weights. An adapter is merged
    into its base (see `load_merged`).

    Args:
        path: Directory of the checkpoint or of the adapter (see `unlearning.checkpoints.locate`).
        device: Device of the weights; "auto" spreads them over all GPUs.
        dtype: Dtype of the weights.
        trust_remote_code: Run model code that comes with the checkpoint.
        allow_pickle: Read pickled weights if there are no safetensors. Unpickling can run code.

    Returns:
        The model.

    Raises:
        InputError: A file is missing or cut short, or the weights do not cover the whole model.
    """
    check_files(path, allow_pickle=allow_pickle)
    if is_adapter(path):
        return load_merged(
            path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
    try:
        with without_bars():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=None if allow_pickle else True,  # None reads pickles only if there are no safetensors
                ignore_mismatched_sizes=True,  # refused below, in one line
                output_loading_info=True,
                device_map="auto" if device == "auto" else None,
            )
    except pickle.UnpicklingError:
        raise InputError(f"{path}: its pickled weights are broken or hold more than tensors; copy them again") from None
    except (ValueError, OSError, RuntimeError, KeyError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        mend = "name a causal language model that it knows" if isinstance(error, ValueError) else "copy it again"
        raise InputError(f"{path}: transformers cannot load it: {reason}; {mend}") from None
    model, info = loaded
    # transformers only logs missing and mismatched tensors, and continues with random numbers.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{path}: {len(missing)} missing keys in its weights, such as {missing[0]}; "
            "the files do not belong to its config.json"
        )
    if info["mismatched_keys"]:
        key, in_file, in_model = sorted(info["mismatched_keys"])[0]
        raise InputError(
            f"{path}: the tensor {key} has shape {tuple(in_file)}, and its config.json wants {tuple(in_model)}; "
            "the files do not belong together"
        )
    if info["unexpected_keys"]:
        unexpected = sorted(info["unexpected_keys"])
        warnings.warn(
            f"{path}: {len(unexpected)} tensors of its weights are not part of the model, such as {unexpected[0]}; "
            "check that its config.json is the right one",
            stacklevel=2,
        )
    assert isinstance(model, PreTrainedModel)
    return (model if device == "auto" else model.to(device)).eval()  # type: ignore[arg-type]


def load_merged(
    path: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    allow_pickle: bool,
) -> PreTrainedModel:
    """Load the base of an adapter and merge the adapter into it, in evaluation mode.

    The merge is computed in float32 or wider, on the CPU; a model in half precision is rounded once, after the merge.

    Args:
        path: Directory of the adapter.
        device: Device of the merged weights.
        dtype: Dtype of the merged weights.
        trust_remote_code: Run model code that comes with the base.
        allow_pickle: Read pickled weights of base and adapter.

    Returns:
        The merged model.

    Raises:
        InputError: The base cannot be loaded (see `load_weights`) or is not the one that the adapter was trained on,
            the adapter does not fit the base or cannot be merged, or peft is not installed.
    """
    require_peft()
    if device == "auto":
        raise InputError(
            f"{path}: `device` must be one device for an adapter, got auto. Set it to cuda, or merge and save it first"
        )
    base_path = base_of(path)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    base = load_weights(base_path, dtype=wide, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    return merge_adapter(path, base_path, base).to(dtype).to(device).eval()  # type: ignore[arg-type]


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; of an adapter its own, or else its base's.

    Args:
        path: Directory of the checkpoint or of the adapter.
        trust_remote_code: Run tokenizer code that comes with the checkpoint.

    Returns:
        The tokenizer.

    Raises:
        InputError: The directory has no tokenizer, or a broken one.
    """
    if not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        if is_adapter(path):
            return load_tokenizer(weights_directory(path), trust_remote_code=trust_remote_code)
        raise InputError(f"{path}: no tokenizer; copy tokenizer.json and tokenizer_config.json beside the weights")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        reason = str(error).strip().splitlines()[0].rstrip(":")
        raise InputError(
            f"{path}: the tokenizer cannot be read ({reason}); copy tokenizer.json and tokenizer_config.json again"
        ) from None


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' progress bars and logs within the context."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()
