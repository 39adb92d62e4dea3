"""Find a checkpoint's directory by name, and check that its files are whole."""

import json
from importlib.metadata import entry_points
from pathlib import Path

from safetensors import SafetensorError, safe_open

from unlearning.common.errors import InputError

RECORD = "unlearning.json"
"""File in which a training run describes itself."""

WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
OTHER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Patterns of the files that are downloaded from the hub."""

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
"""Files of an adapter, as peft names them."""


def locate_checkpoint(name: str | Path) -> Path:
    """Find a checkpoint's local directory by its name; a checkpoint on the hub is downloaded.

    An installed package provides built-in names by registering a function from name to directory under the entry
    point group `unlearning.models`. The function's name is the word before the colon of the models' names.

    Args:
        name: A directory, a built-in name such as `demo:base`, or a hub id (`owner/name`).

    Returns:
        The directory.

    Raises:
        InputError: No directory, built-in model or hub repository has the name.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{name}: is a file; name the checkpoint's directory")
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such directory; name the checkpoint's directory")
    if ":" in name:  # no hub id holds a colon
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
    """Return whether a directory holds a peft adapter: weights that are merged into a base, which the adapter names."""
    return (path / ADAPTER_CONFIG).is_file()


def weights_directory(path: Path) -> Path:
    """Find the directory of a whole model's weights: an adapter's base, or any other checkpoint itself.

    Args:
        path: Directory of a checkpoint or of an adapter.

    Returns:
        The directory.

    Raises:
        InputError: The adapter names no base, or a base that cannot be found.
    """
    return weights_directory(base_of(path)) if is_adapter(path) else path


def check_files(path: Path, *, allow_pickle: bool = False) -> None:
    """Check that a checkpoint's weight files are complete, before any weight is read; of an adapter, its base's too.

    Args:
        path: Directory of a checkpoint or of an adapter.
        allow_pickle: Accept pickled weights, which are not checked.

    Raises:
        InputError: The configuration, the safetensors or a shard is missing, or a file is cut short (the message
            names the file).
    """
    if is_adapter(path):
        check_adapter(path, allow_pickle=allow_pickle)
        check_files(base_of(path), allow_pickle=allow_pickle)
        return
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json; name the directory that holds the checkpoint")
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:  # broken JSON, or bytes that are not UTF-8
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
        found = "only pickled weights (set `allow_pickle` if you trust them)" if any(path.glob("*.bin")) else "none"
        raise InputError(f"{path}: weights are read from safetensors files, and there are {found}")
    for shard in shards:
        file = path / shard
        if not file.is_file():
            raise InputError(f"{file}: missing, though {index.name} names it; copy it again")
        _check_whole(file)


def base_of(path: Path) -> Path:
    """Find the directory of the base that an adapter names.

    Args:
        path: Directory of the adapter.

    Returns:
        The base's directory.

    Raises:
        InputError: The adapter's configuration is broken or names no base, or the base cannot be found.
    """
    try:
        name = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path / ADAPTER_CONFIG}: broken; copy it again") from None
    if not isinstance(name, str) or not name:
        raise InputError(f"{path / ADAPTER_CONFIG}: names no base; write it as base_model_name_or_path")
    try:
        found = locate_checkpoint(name)
    except InputError as error:
        raise InputError(
            f"{path}: its base cannot be found: {error} (base_model_name_or_path in {ADAPTER_CONFIG})"
        ) from None
    if found.resolve() == path.resolve():
        raise InputError(f"{path / ADAPTER_CONFIG}: names itself as its base; write the base's name there")
    return found


def check_adapter(path: Path, *, allow_pickle: bool = False) -> None:
    """Check that an adapter's own files are complete.

    Args:
        path: Directory of the adapter.
        allow_pickle: Accept pickled weights, which are not checked.

    Raises:
        InputError: The weights are missing, cut short, or pickled.
    """
    file = path / WEIGHTS
    if not file.is_file():
        if not (path / PICKLED).is_file():
            raise InputError(f"{file}: missing, though there is an {ADAPTER_CONFIG}; copy it again")
        if not allow_pickle:
            raise InputError(f"{path}: only pickled adapter weights (set `allow_pickle` if you trust them)")
        return
    _check_whole(file)


def _check_whole(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cut short or not safetensors ({error}); copy it again") from None
