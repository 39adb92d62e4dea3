"""Load the model and the tokenizer of a checkpoint's directory, or refuse in one line what is broken."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from unlearning.checkpoints.experts import fit_experts
from unlearning.checkpoints.fit import check_fit, check_tensors
from unlearning.checkpoints.keys import common_prefix, find_places, find_wrappers, without_wrappers
from unlearning.checkpoints.links import check_links
from unlearning.checkpoints.locate import (
    adapter_chain,
    base_of,
    check_files,
    is_adapter,
    quantization,
    read_json,
    stored_headers,
    weight_files,
)
from unlearning.checkpoints.lora import merge_adapter, require_peft
from unlearning.checkpoints.quantized import (
    check_stored,
    dequantized,
    prepare,
    quiet_bitsandbytes,
)
from unlearning.checkpoints.repeatable import without_sampling
from unlearning.checkpoints.sizes import check_parts, check_sizes
from unlearning.checkpoints.token_ids import GENERATION_CONFIG, read_generation_config
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
    config = load_config(path, trust_remote_code=trust_remote_code)
    method = quantization(read_json(path), path)
    if method is not None and device == "auto":
        raise InputError(f"{path}: `device` must be one device for quantized weights, got auto. Set it to cuda")
    prepare(config, method)
    try:
        with without_bars(), quiet_bitsandbytes(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pickle protocol")  # of pickles that the user allowed
            headers = stored_headers(path, allow_pickle=allow_pickle)
            check_stored(headers, method, path)
            quantized = method is not None
            built = check_fit(path, config, headers, quantized=quantized, trust_remote_code=trust_remote_code)
            wrappers = find_wrappers(headers)
            loaded = _read(
                path,
                config,
                wrappers,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                device_map={"": device} if method is not None else "auto" if device == "auto" else None,
            )
    except InputError:
        raise
    except Exception as error:  # the configuration is a stranger's: KeyError, AssertionError, TypeError and others
        raise InputError(f"{path}: transformers cannot load it: {_reason(error)}; {_mend(error)}") from None
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    if method is None and built is None:
        check_tensors(model, headers, path)
    # transformers only logs missing and mismatched tensors, and continues with random numbers.
    if info["missing_keys"]:
        unexpected = find_places(model, headers).unexpected
        raise InputError(f"{path}: {missing_keys(info['missing_keys'], unexpected, model.base_model_prefix)}")
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
    n_tokens = getattr(config.get_text_config(), "vocab_size", None)
    beyond = [token for token in read_generation_config(path) if n_tokens is not None and token >= n_tokens]
    if beyond:
        warnings.warn(
            f"{path / GENERATION_CONFIG}: eos_token_id {beyond[0]} is not among the {n_tokens} tokens of the model, so "
            "it ends no answer",
            stacklevel=2,
        )
    if wrappers:
        warnings.warn(f"{path}: the names of its weights are read without {', '.join(wrappers)}", stacklevel=2)
    if method is not None:
        model = dequantized(model, dtype, path)
        warnings.warn(
            f"{path}: its weights are quantized ({method}); they were dequantized, and everything is computed with "
            f"{str(dtype).removeprefix('torch.')} weights",
            stacklevel=2,
        )
    fit_experts(model)
    return (model if device == "auto" else model.to(device)).eval()  # type: ignore[arg-type]


def load_config(path: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a checkpoint's configuration as transformers does.

    Args:
        path: Directory of the checkpoint.
        trust_remote_code: Run configuration code that comes with the checkpoint.

    Returns:
        The configuration.

    Raises:
        InputError: There is no config.json; a value has the wrong type or is impossible; or the architecture is
            unknown, or has its own code.
    """
    check_sizes(read_json(path), {}, path / "config.json")
    try:
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            check_parts(config, path / "config.json")
            return _computing(config)
    except InputError:
        raise
    except Exception as error:  # a configuration class may do anything with a stranger's values
        raise InputError(
            f"{path}: transformers cannot load it: its config.json: {_reason(error)}; {_mend(error)}"
        ) from None


def _computing(config: PretrainedConfig) -> PretrainedConfig:
    """Reset the fields that choose what a call returns, which are no part of what is computed."""
    for part in (config, config.get_text_config()):
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    return config


def _reason(error: Exception) -> str:
    """Return an error's first line; of an invalid value in a configuration, also the line that names it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError):
        return f"unknown {lines[0]}"
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0]).rstrip(".")


def _mend(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with its own code, which runs only if you set `trust_remote_code`"
    unknown = "name a causal language model that it knows"
    return unknown if isinstance(error, ValueError) else "copy it again"


def missing_keys(missing: Iterable[str], unexpected: Iterable[str], base_model_prefix: str) -> str:
    """Return in words that weights are missing; if they are there under a common prefix, name it.

    Args:
        missing: Keys of the model that are not on disk.
        unexpected: Names of the tensors on disk that have no place in the model.
        base_model_prefix: Part of the model's keys that a checkpoint may leave out, such as `model`.

    Returns:
        The message without the directory.
    """
    missing = sorted(missing)
    prefix = common_prefix(missing, unexpected, base_model_prefix)
    if prefix is not None:
        return (
            f"the names of its weights begin with {prefix}, and those of its class do not; take it off: "
            f"safetensors.torch.save_file({{name.removeprefix({prefix!r}): tensor for name, tensor in "
            "safetensors.torch.load_file(FILE).items()}, FILE, metadata={'format': 'pt'})"
        )
    return (
        f"{len(missing)} missing keys in its weights, such as {missing[0]}; the files do not belong to its config.json"
    )


def _read(
    path: Path,
    config: PretrainedConfig,
    wrappers: list[str],
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
    **options: Any,
) -> Any:
    """Let transformers read weights, under names without the parts of wrappers; return the model and a report."""
    options |= {
        "config": config,
        "ignore_mismatched_sizes": True,  # refused by the caller, in one line
        "output_loading_info": True,
        "adapter_kwargs": {"subfolder": "-"},  # a configuration of an adapter that is left over is not followed
    }
    if not wrappers:
        safe = None if allow_pickle else True  # None reads pickles only if there are no safetensors
        return AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=safe, trust_remote_code=trust_remote_code, **options
        )
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path, allow_pickle=allow_pickle):
        safetensors = file.suffix == ".safetensors"
        tensors |= load_file(file) if safetensors else torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        of_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    if (path / "generation_config.json").is_file():
        options["generation_config"] = GenerationConfig.from_pretrained(path)
    named = {without_wrappers(name, wrappers): tensor for name, tensor in tensors.items()}
    model, report = of_class.from_pretrained(None, state_dict=named, **options)
    model.name_or_path = str(path)
    return model, report


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
        InputError: The directory has no tokenizer, a broken one, or one that splits texts at random.

    Warns:
        UserWarning: The tokenizer would split texts at random, which was switched off.
    """
    path = tokenizer_directory(path)
    if (path / "config.json").is_file():  # transformers reads it too, and would blame the tokenizer
        load_config(path, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception on a broken file
        mend = "copy tokenizer.json and tokenizer_config.json again"
        if "trust_remote_code" in str(error):
            mend = _mend(error)
        raise InputError(f"{path}: the tokenizer cannot be read ({_reason(error).rstrip(':')}); {mend}") from None
    return without_sampling(tokenizer, name=str(path))


def tokenizer_directory(path: Path) -> Path:
    """Find the directory of a checkpoint's tokenizer: of an adapter without one, its base's.

    Args:
        path: Directory of the checkpoint or of the adapter.

    Returns:
        The directory.

    Raises:
        InputError: There is no tokenizer.
    """
    for directory in adapter_chain(path):
        if any((directory / file).is_file() for file in TOKENIZER_FILES):
            check_links(directory, *TOKENIZER_FILES)
            return directory
    check_links(path, *TOKENIZER_FILES)
    raise InputError(f"{path}: no tokenizer; copy tokenizer.json and tokenizer_config.json beside the weights")


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


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
