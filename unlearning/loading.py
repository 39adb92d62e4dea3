"""Model and tokenizer from a directory or a hub id, with errors that a person can act on."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from unlearning.errors import InputError


def load_model(model: str | Path | PreTrainedModel) -> PreTrainedModel:
    """Load a causal language model in float32, whatever the checkpoint's dtype; a loaded one is taken as it is.

    float32 because a CPU multiplies bfloat16 a hundred times slower, and because updates at learning rates
    of 1e-5 are below bfloat16's resolution of most weights.

    Raises:
        InputError: no such directory, nothing to load in it, weights that are broken or incomplete.
    """
    if isinstance(model, PreTrainedModel):
        return model.float()
    try:
        with without_bars():
            result: Any = AutoModelForCausalLM.from_pretrained(
                str(model), dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except SafetensorError as error:
        raise InputError(f"{model}: broken weights ({_first_line(error)}); copy the checkpoint again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: no model can be loaded ({_first_line(error)})") from None
    loaded, info = result
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(f"{model}: {len(missing)} tensors are missing, {missing[0]} first; copy the checkpoint again")
    return loaded


def locate_model(model: str | Path | PreTrainedModel) -> str | Path | PreTrainedModel:
    """Where to load a model from: built-in names become directories, directories are checked, the rest is hub ids.

    An installed package provides models under names such as `demo:base` by registering a function from name to
    directory under the entry point group `unlearning.models`, named by the word before the colon: the built-in
    models belong to a package that imports this one.

    Raises:
        InputError: no such directory, no model in it, or nothing provides such a name.
    """
    if isinstance(model, PreTrainedModel):
        return model
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: the directory has no config.json; name the directory of a saved model")
        return path
    if path.is_file():
        raise InputError(f"{path}: a file; name the directory of a saved model")
    if isinstance(model, Path) or model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such directory; name the directory of a saved model")
    if ":" in model:  # which no hub id holds
        return _provided(model)
    return model


def _provided(name: str) -> Path:
    family = name.partition(":")[0]
    providers = {entry.name: entry for entry in entry_points(group="unlearning.models")}
    if family not in providers:
        known = ", ".join(f"{provider}:..." for provider in sorted(providers)) or "none are installed"
        raise InputError(f"no built-in model {name!r} ({known}); give a directory or a hub id")
    return Path(providers[family].load()(name))


def load_tokenizer(model: str | Path | PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside a model.

    Raises:
        InputError: there is none.
    """
    where = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
    if not where:
        raise InputError("a loaded model has no directory to take a tokenizer from; pass tokenizer=...")
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: no tokenizer can be loaded ({_first_line(error)}); save one there") from None


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers' bars over weight files, and put them back as they were."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
