"""Find a checkpoint's directory by name, and check that its files are whole and can be read."""

import json
import re
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unlearning.checkpoints.headers import Header, read_headers
from unlearning.checkpoints.links import check_links
from unlearning.checkpoints.sizes import check_sizes
from unlearning.checkpoints.token_ids import check_end_tokens
from unlearning.common.errors import InputError
from unlearning.common.places import is_directory, is_there, kind_of

RECORD = "unlearning.json"
"""File in which a training run describes itself."""

WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
OTHER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Patterns of the files that are downloaded from the hub."""

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
"""Files of an adapter, as peft names them."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
"""Weight files of a whole model, as transformers names them."""

DEQUANTIZED = ("bitsandbytes", "fp8", "mxfp4")
"""Quantization methods whose weights are dequantized on loading, as `quant_method` in a configuration names them."""

UNQUANTIZED = "name the checkpoint that it was quantized from, or dequantize it and save that"
"""What to do about quantized weights that cannot be read."""


def locate_checkpoint(name: str | Path) -> Path:
    """Find a checkpoint's local directory by its name; a checkpoint on the hub is downloaded.

    An installed package provides built-in names by registering a function from name to directory under the entry
    point group `unlearning.models`. The function's name is the word before the colon of the models' names.

    Args:
        name: A directory, a built-in name such as `demo:base`, or a hub id (`owner/name`, or `owner/name@revision` with
            a branch, tag or commit).

    Returns:
        The directory.

    Raises:
        InputError: No directory, built-in model or hub repository has the name.
    """
    found = locate_offline(name)
    return _download(str(name)) if found is None else found


def locate_offline(name: str | Path) -> Path | None:
    """Find a checkpoint's local directory by its name, without asking the hub.

    Args:
        name: See `locate_checkpoint`.

    Returns:
        The directory; None for a hub id.

    Raises:
        InputError: The name is empty, no name at all, or no hub id, and no directory or built-in model has it.
    """
    if isinstance(name, str) and not name.strip():
        raise InputError("the name is empty; give a directory, a built-in name or a hub id")
    if len(str(name)) > _LONGEST or re.search(r"[\x00-\x1f\x7f]", str(name)):
        raise InputError(f"{str(name)[:60]!r}: not the name of a directory, a built-in model or a hub repository")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name}: {error} name the checkpoint's directory") from None
    if is_directory(path):
        return path
    if is_there(path):
        raise InputError(f"{name}: is a file; name the checkpoint's directory")
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such directory; name the checkpoint's directory")
    if ":" in name:  # no hub id holds a colon
        return _provided(name)
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"{name}: no such directory, and not a hub id (owner/name or owner/name@revision) or a built-in name "
            "(demo:base)"
        )
    return None


def locate_record(name: str | Path) -> Path | None:
    """Find the record that a training run wrote beside a checkpoint, which is downloaded if it is on the hub.

    Args:
        name: See `locate_checkpoint`.

    Returns:
        What is at the record's place, a broken link or a pipe too: `DIR/unlearning.json` for `DIR` and for
        `DIR/checkpoints/...`; None if nothing is there, or no directory or built-in model has the name.

    Raises:
        InputError: The hub has no such checkpoint, or cannot be reached.
    """
    try:
        path = locate_offline(name)
    except InputError:  # as whoever loads the model says
        return None
    path = (_downloaded(str(name)) if path is None else path).absolute()
    places = (path, path.parent.parent) if path.parent.name == "checkpoints" else (path,)
    return next((place / RECORD for place in places if kind_of(place / RECORD) != "nothing"), None)


def _downloaded(name: str) -> Path:
    """Return the directory of a checkpoint on the hub without asking the hub, if it was downloaded before."""
    from huggingface_hub import snapshot_download

    hub_id, revision = split_revision(name)
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not downloaded yet, or no valid id
        return _download(name)


_LONGEST = 4096
"""Characters of the longest path that a system opens."""

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^@\s]+))?")


def split_revision(name: str) -> tuple[str, str | None]:
    """Split a name into hub id and revision.

    Args:
        name: Any name of a checkpoint.

    Returns:
        Hub id and revision, which is None if the name has none; any other name unchanged and None.
    """
    found = None if is_there(Path(name).expanduser()) else _HUB_ID.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def resolved_name(name: str, path: Path) -> str:
    """Return a name that keeps its meaning: a hub id gets the commit that was downloaded.

    Args:
        name: Name of a checkpoint.
        path: Directory that `locate_checkpoint` returned for it.

    Returns:
        `owner/name@commit` for a downloaded checkpoint, any other name unchanged.
    """
    downloaded = path.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", path.name)
    if not downloaded or not _HUB_ID.fullmatch(name) or is_directory(Path(name).expanduser()):
        return name
    return f"{split_revision(name)[0]}@{path.name}"


def _provided(name: str) -> Path:
    family = name.partition(":")[0]
    providers = {entry.name: entry for entry in entry_points(group="unlearning.models")}
    if family not in providers:
        known = ", ".join(f"{provider}:..." for provider in sorted(providers)) or "none are installed"
        raise InputError(f"no built-in model {name!r} ({known}); give a directory or a hub id")
    return Path(providers[family].load()(name))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub_id, revision = split_revision(name)
    patterns = [*WEIGHT_FILES, *OTHER_FILES, "*.bin"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except RevisionNotFoundError:
        raise InputError(f"{name}: {hub_id} has no revision {revision}; name a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{name}: the hub has no {hub_id}, or does not show it to you; log in (hf auth login), or name a directory"
        ) from None
    except LocalEntryNotFoundError:
        raise InputError(
            f"{name}: no such directory, and the hub cannot be reached; download it and name its directory"
        ) from None
    except HFValidationError as error:
        raise InputError(f"{name}: not a hub id: {str(error).splitlines()[0]}") from None
    except HfHubHTTPError as error:
        raise InputError(f"{name}: the hub refused it: {str(error).splitlines()[0]}") from None


def is_adapter(path: Path) -> bool:
    """Return whether a directory holds a peft adapter: weights that are merged into a base, which the adapter names.

    A configuration of an adapter without its weights, left over beside a whole model's weights, makes no adapter.
    """
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    whole = any((path / file).is_file() for file in (SINGLE, INDEX, PICKLED_SINGLE, PICKLED_INDEX))
    return not whole or any((path / file).is_file() for file in (WEIGHTS, PICKLED))


def weights_directory(path: Path) -> Path:
    """Find the directory of a whole model's weights: an adapter's base, or any other checkpoint itself.

    Args:
        path: Directory of a checkpoint or of an adapter.

    Returns:
        The directory.

    Raises:
        InputError: There is no such directory (see `adapter_chain`).
    """
    return adapter_chain(path)[-1]


def adapter_chain(path: Path) -> list[Path]:
    """Find the directories that the weights of a checkpoint are in: adapters, each before its base, then a whole model.

    Args:
        path: Directory of a checkpoint or of an adapter.

    Returns:
        The directories, from `path` to the whole model; only `path` if it is no adapter.

    Raises:
        InputError: An adapter names no base, or one that cannot be found, or the adapters are each other's bases.
    """
    chain, seen = [path], {path.resolve()}
    while is_adapter(chain[-1]):
        base = base_of(chain[-1])
        if base.resolve() in seen:
            raise InputError(
                f"{path}: its base is never reached: the adapters name each other "
                f"({' -> '.join(str(part) for part in [*chain, base])}); write the whole model's name as "
                f"base_model_name_or_path in {chain[-1] / ADAPTER_CONFIG}"
            )
        chain.append(base)
        seen.add(base.resolve())
    return chain


def check_files(path: Path, *, allow_pickle: bool = False) -> None:
    """Check that a checkpoint's weight files are complete, before any weight is read; of an adapter, its base's too.

    Args:
        path: Directory of a checkpoint or of an adapter.
        allow_pickle: Accept pickled weights, which are not checked.

    Raises:
        InputError: The configuration, the safetensors or a shard is missing, a file is cut short (the message names
            the file), the configuration states sizes that the tensors cannot have, or a configuration's end tokens are
            none.
    """
    *adapters, path = adapter_chain(path)
    for adapter in adapters:
        check_adapter(adapter, allow_pickle=allow_pickle)
    stated = read_json(path)
    quantization(stated, path)
    check_end_tokens(path, stated)
    headers: dict[str, Header] = {}
    for file in weight_files(path, allow_pickle=allow_pickle):
        if file.suffix == ".safetensors":
            headers |= _whole(file)
    check_sizes(stated, headers, path / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Args:
        path: Directory of the checkpoint.

    Returns:
        Its content.

    Raises:
        InputError: There is no config.json, or a broken one.
    """
    file = path / "config.json"
    if not file.is_file():
        check_links(path, "config.json", ADAPTER_CONFIG)
        raise InputError(f"{path}: no config.json; name the directory that holds the checkpoint")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # broken JSON, or bytes that are not UTF-8
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{file}: broken; copy it again")
    return content


def quantization(config: dict[str, Any], path: Path) -> str | None:
    """Return the quantization method of a checkpoint whose weights can be dequantized.

    Args:
        config: Content of the checkpoint's config.json.
        path: Directory of the checkpoint, for messages.

    Returns:
        The method; None if the weights are not quantized.

    Raises:
        InputError: No method is named, or its weights cannot be dequantized here (the message names the method).
    """
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str):
        raise InputError(
            f"{path / 'config.json'}: its quantization_config names no quant_method; remove it if the weights are not "
            "quantized"
        )
    if method not in DEQUANTIZED:
        raise InputError(f"{path}: its weights are quantized ({method}), and cannot be read here; {UNQUANTIZED}")
    if method == "bitsandbytes" and find_spec("bitsandbytes") is None:
        raise InputError(
            f"{path}: its weights are quantized (bitsandbytes): pip install bitsandbytes to dequantize them on loading"
        )
    return method


def weight_files(path: Path, *, allow_pickle: bool = False) -> list[Path]:
    """Return the files that transformers reads a whole model's weights from.

    Args:
        path: Directory of the checkpoint.
        allow_pickle: Return pickled files if there are no safetensors.

    Returns:
        One file, or the shards that an index names.

    Raises:
        InputError: There are no such files, a shard is missing, or the index is broken.
    """
    kinds = ((SINGLE, INDEX), (PICKLED_SINGLE, PICKLED_INDEX)) if allow_pickle else ((SINGLE, INDEX),)
    for single, index in kinds:
        if (path / single).is_file():
            return [path / single]
        if (path / index).is_file():
            return _shards(path, path / index)
    check_links(path, *(file for kind in kinds for file in kind))
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        raise InputError(f"{path}: no {SINGLE} and no {INDEX}; name the weight file so, or save the model again")
    pickled = "only pickled weights (set `allow_pickle` if you trust them)"
    found = pickled if any(path.glob("*.bin")) and not allow_pickle else "none"
    raise InputError(f"{path}: weights are read from safetensors files, and there are {found}")


def stored_headers(path: Path, *, allow_pickle: bool = False) -> dict[str, Header]:
    """Return the header of every tensor of a whole model's checkpoint.

    Args:
        path: Directory of the checkpoint.
        allow_pickle: Read pickled weights if there are no safetensors.

    Returns:
        Headers by name on disk.

    Raises:
        InputError: A file is missing (see `weight_files`), or a pickled one holds something else than tensors.
    """
    headers: dict[str, Header] = {}
    for file in weight_files(path, allow_pickle=allow_pickle):
        headers |= read_headers(file)
    return headers


def _shards(path: Path, index: Path) -> list[Path]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not shards or any(Path(shard).name != shard for shard in shards):  # a path would lead out of the directory
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index}: broken index; copy it again") from None
    for shard in shards:
        if not (path / shard).is_file():
            check_links(path, shard)
            raise InputError(f"{path / shard}: missing, though {index.name} names it; copy it again")
    return [path / shard for shard in shards]


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
        config = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path / ADAPTER_CONFIG}: broken; copy it again") from None
    if not isinstance(name, str) or not name:
        raise InputError(f"{path / ADAPTER_CONFIG}: names no base; write it as base_model_name_or_path")
    if isinstance(revision, str) and split_revision(name) == (name, None) and _HUB_ID.fullmatch(name):
        name = f"{name}@{revision}"
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
            check_links(path, WEIGHTS, PICKLED)
            raise InputError(f"{file}: missing, though there is an {ADAPTER_CONFIG}; copy it again")
        if not allow_pickle:
            raise InputError(f"{path}: only pickled adapter weights (set `allow_pickle` if you trust them)")
        return
    _whole(file)


def _whole(file: Path) -> dict[str, Header]:
    """Read the headers of a safetensors file, which is refused if it is cut short."""
    try:
        return read_headers(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: cut short or not safetensors ({error}); copy it again") from None
