"""From a name to weights that can be trusted: built-in names, directories, hub ids; whole files; finite numbers."""

import hashlib
import json
import pickle
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from unlearning.common.errors import InputError

WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
OTHER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
ADAPTER_CONFIG = "adapter_config.json"


def locate_checkpoint(name: str | Path) -> Path:
    """The local directory of a directory's name, a built-in name such as `demo:base`, or a hub id (downloaded).

    An installed package provides built-in names by registering a function from name to directory under the entry
    point group `unlearning.models`, named by the word before the colon.

    Raises:
        InputError: there is nothing of that name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{name}: a file; name the checkpoint's directory")
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such directory; name the checkpoint's directory")
    if ":" in name:  # which no hub id holds
        return _provided(name)
    if name.count("/") != 1:
        raise InputError(f"{name}: no such directory, and not a hub id (owner/name) or a built-in name (demo:base)")
    return _download(name)


def _provided(name: str) -> Path:
    family = name.partition(":")[0]
    providers = {entry.name: entry for entry in entry_points(group="unlearning.models")}
    if family not in providers:
        known = ", ".join(f"{provider}:..." for provider in sorted(providers)) or "none are installed"
        raise InputError(f"no built-in model {name!r} ({known}); give a directory or a hub id")
    return Path(providers[family].load()(name))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*WEIGHT_FILES, *OTHER_FILES, "*.bin"]))
    except LocalEntryNotFoundError:
        raise InputError(
            f"{hub_id}: no such directory, and the hub cannot be reached; download it and name its directory"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{hub_id}: the hub refused it: {str(error).splitlines()[0]}") from None


def is_adapter(path: Path) -> bool:
    """Whether a directory holds a peft adapter: weights to be merged into a base that it names."""
    return (path / ADAPTER_CONFIG).is_file()


def weights_directory(path: Path) -> Path:
    """The directory that holds a whole model's weights: an adapter's base, any other checkpoint itself.

    Raises:
        InputError: the adapter names no base, or one that cannot be found.
    """
    if not is_adapter(path):
        return path
    from unlearning.checkpoints.lora import base_of

    return weights_directory(base_of(path))


def check_files(path: Path, *, allow_pickle: bool = False) -> None:
    """Check that a checkpoint's weight files are all there and whole, before anything is read into memory.

    Of an adapter, its base's too.

    Raises:
        InputError: no configuration, no safetensors, a missing shard, or a file that is cut short (which).
    """
    if is_adapter(path):
        from unlearning.checkpoints.lora import base_of, check_adapter

        check_adapter(path, allow_pickle=allow_pickle)
        check_files(base_of(path), allow_pickle=allow_pickle)
        return
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json; name the directory that holds the checkpoint")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:  # not JSON, or not even text
        raise InputError(f"{path / 'config.json'}: broken; copy it again") from None
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: broken index; copy it again") from None
    else:
        shards = sorted(file.name for file in path.glob("*.safetensors"))
    if not shards:
        if allow_pickle and any(path.glob("*.bin")):
            return
        found = "only pickled weights (pass --allow-pickle if you trust them)" if any(path.glob("*.bin")) else "none"
        raise InputError(f"{path}: weights are read from safetensors files, and there are {found}")
    for shard in shards:
        file = path / shard
        if not file.is_file():
            raise InputError(f"{file}: missing, though {index.name} names it; copy it again")
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cut short or not safetensors ({error}); copy it again") from None


def load_weights(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, in `dtype`, on `device` (`auto`: spread over all GPUs).

    float32 by default, whatever the checkpoint's dtype: a CPU multiplies bfloat16 a hundred times slower, and
    training updates at learning rates of 1e-5 are below bfloat16's resolution of most weights. An adapter comes merged
    into its base (`unlearning.checkpoints.lora`).

    Raises:
        InputError: a file is missing or cut short, or the weights do not cover the whole model.
    """
    check_files(path, allow_pickle=allow_pickle)
    if is_adapter(path):
        from unlearning.checkpoints.lora import load_merged

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
                use_safetensors=None if allow_pickle else True,  # None: pickles only where there is nothing else
                ignore_mismatched_sizes=True,  # named below, instead of in a report on the log
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
    # transformers only logs these and goes on with random numbers.
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"{path}: {len(missing)} missing keys in its weights, as {missing[0]}; "
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
            f"{path}: {len(unexpected)} tensors of its weights have no place in the model, as {unexpected[0]}; "
            "is its config.json the right one?",
            stacklevel=2,
        )
    assert isinstance(model, PreTrainedModel)
    return (model if device == "auto" else model.to(device)).eval()  # type: ignore[arg-type]


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a checkpoint; with an adapter, its own or else its base's.

    Raises:
        InputError: there is none, or it is broken.
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


def content_hash(model: PreTrainedModel, *, name: str) -> str:
    """SHA-256 over the name, shape and `tensor_hash` of every tensor, whatever files they came from.

    The same weights give the same hash from one file or many shards, in any load dtype that holds them, and when
    they are never in memory together.

    Raises:
        InputError: a tensor holds a value that is not finite (which tensor).
    """
    tensors = model.state_dict()
    hashes = {key: finite_hash(_pieces(tensor), key=key, name=name) for key, tensor in tensors.items()}
    return combined_hash((key, tensor.shape, hashes[key]) for key, tensor in tensors.items())


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in row-major order as float32 bytes."""
    return _hash_pieces(_pieces(tensor))[0]


def finite_hash(pieces: Iterable[Tensor], *, key: str, name: str) -> str:
    """`tensor_hash` of the tensor `key` of the model `name`, from its values piece by piece.

    Raises:
        InputError: a value is NaN or infinite.
    """
    sha256, n_values, n_bad = _hash_pieces(pieces)
    if n_bad:
        raise InputError(f"{name}: {n_bad} of {n_values} values of the tensor {key} are NaN or infinite")
    return sha256


def combined_hash(tensors: Iterable[tuple[str, Sequence[int], str]]) -> str:
    """SHA-256 over the name, shape and `tensor_hash` of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key, shape, sha256 in sorted((key, tuple(shape), sha256) for key, shape, sha256 in tensors):
        digest.update(f"{key}{shape}{sha256}\n".encode())
    return digest.hexdigest()


HASHED_AT_ONCE = 2**18
"""Values that are widened to float32 and hashed together: 1 MiB, which a core's cache holds."""


def _pieces(tensor: Tensor) -> Iterable[Tensor]:
    return tensor.detach().flatten().split(HASHED_AT_ONCE)


def _hash_pieces(pieces: Iterable[Tensor]) -> tuple[str, int, int]:
    """The hash, the number of values, and how many of them are not finite."""
    digest, n_values, n_bad = hashlib.sha256(), 0, 0
    for piece in pieces:
        values = piece.to("cpu", torch.float32)
        n_values += values.numel()
        if not torch.isfinite(values.sum()):  # which large finite values overflow too, so they are counted
            n_bad += int((~torch.isfinite(values)).sum())
        digest.update(values.numpy().data)
    return digest.hexdigest(), n_values, n_bad


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence what transformers says while it reads and writes weight files, and put it back as it was."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()
