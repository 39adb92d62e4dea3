"""Names of tensors on disk and in the model: transformers' renamings, and what wrappers put into names."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from unlearning.common.errors import InputError

INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts that torch.compile, FSDP and activation checkpointing insert anywhere in names."""

OUTERMOST = ("module.", "base_model.model.")
"""Prefixes of all names: of data parallel models, and of peft's."""


@dataclass(frozen=True)
class Places:
    """Places of a checkpoint's tensors in a model.

    Attributes:
        stored: For keys of the model's state dict, the name of the tensor on disk.
        converted: Names on disk that transformers converts (merges or splits), each with the key that it goes to.
        doubled: Keys that two tensors on disk are, each with both names.
        unexpected: Names on disk that have no place.
    """

    stored: dict[str, str]
    converted: dict[str, str]
    doubled: dict[str, tuple[str, str]]
    unexpected: list[str]


def find_places(model: PreTrainedModel, names: Iterable[str]) -> Places:
    """Find the key in a model of every tensor on disk, by transformers' rules for loading a checkpoint.

    Args:
        model: The model; its parameters may be on the meta device.
        names: Names of the tensors on disk.

    Returns:
        The places; tied keys that are not on disk themselves are left out.
    """
    names = sorted(names)
    wrappers = find_wrappers(names)
    wanted = model.state_dict()
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    places = Places({}, {}, {}, [])
    for name in names:
        bare = without_wrappers(name, wrappers)
        key, converted = rename_source_key(bare, renamings, converters, model.base_model_prefix, wanted)
        if key not in wanted and bare in wanted:
            key, converted = bare, None
        if converted is not None:
            places.converted[name] = key
        elif key not in wanted:
            places.unexpected.append(name)
        elif key in places.stored:
            places.doubled[key] = (places.stored[key], name)
        else:
            places.stored[key] = name
    return places


def check_single(places: Places, path: Path) -> None:
    """Check that no two tensors on disk are the same one of the model.

    Args:
        places: Places of the tensors in the model.
        path: Directory of the checkpoint, for messages.

    Raises:
        InputError: Two tensors are the same one.
    """
    for key, (one, other) in places.doubled.items():
        raise InputError(
            f"{path}: the tensors {one} and {other} are both {key} of the model; the files do not belong together"
        )


def common_prefix(missing: Iterable[str], unexpected: Iterable[str], base_model_prefix: str) -> str | None:
    """Return the prefix under which all missing keys are on disk.

    Args:
        missing: Keys of the model that are not on disk.
        unexpected: Names of the tensors on disk that have no place in the model; the others need no prefix.
        base_model_prefix: Part of the model's keys that a checkpoint may leave out, such as `model`.

    Returns:
        The prefix with its dot; None if there is no such prefix.
    """
    missing, known = sorted(missing), set(unexpected)
    for left_out in ("", f"{base_model_prefix}."):
        first = missing[0].removeprefix(left_out)
        for name in sorted(known):
            prefix = name.removesuffix(first)
            whole = prefix != name and prefix.endswith(".")
            if whole and all(prefix + key.removeprefix(left_out) in known for key in missing):
                return prefix
    return None


def find_wrappers(names: Iterable[str]) -> list[str]:
    """Return the parts that wrappers left in names on disk.

    Args:
        names: Names of all tensors on disk.

    Returns:
        Parts that are inserted anywhere, then prefixes of all names from the outermost; empty if there are none.
    """
    names = list(names)
    found = [part for part in INSERTED if any(part in _parts(name) for name in names)]
    bare = [without_wrappers(name, found) for name in names]
    while outer := next((part for part in OUTERMOST if bare and all(name.startswith(part) for name in bare)), None):
        found.append(outer)
        bare = [name.removeprefix(outer) for name in bare]
    return found


def without_wrappers(name: str, wrappers: Iterable[str]) -> str:
    """Return a name on disk without the parts that `find_wrappers` found."""
    for part in wrappers:
        name = "".join(one for one in _parts(name) if one != part) if part in INSERTED else name.removeprefix(part)
    return name


def _parts(name: str) -> list[str]:
    """Split a name after its dots."""
    *modules, leaf = name.split(".")
    return [*(f"{module}." for module in modules), leaf]
