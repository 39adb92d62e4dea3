"""The files of a data set on the Hugging Face hub, or of a directory with the same layout."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearning.common.errors import InputError, nearest
from unlearning.common.places import is_directory

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt")

_NO_DATA = ("dataset_info.json", "dataset_infos.json")

Splits = dict[str, list[str]]
"""File patterns by split."""


@dataclass(frozen=True)
class Part:
    """One split of one configuration of a data set.

    Attributes:
        name: Name that the user gave, for messages.
        repository: `owner/name` on the hub.
        config: The configuration; None for the only one or the default.
        split: The split; None for the only one or the default.
    """

    name: str
    repository: str
    config: str | None = None
    split: str | None = None


def read_name(name: str) -> Part:
    """Parse `owner/name[:config[:split]]`.

    Args:
        name: The name; a local directory may stand for `owner/name`.

    Returns:
        The part of the data set.

    Raises:
        InputError: The name has another form.
    """
    repository, *rest = name.split(":")
    if repository.count("/") != 1 and not is_directory(repository):
        raise InputError(f"hub:{name}: write hub:owner/name, hub:owner/name:config or hub:owner/name:config:split")
    if len(rest) > 2:
        raise InputError(f"hub:{name}: too many colons; write hub:owner/name:config:split")
    config, split = [*rest, None, None][:2]
    return Part(f"hub:{name}", repository, config or None, split or None)


def find_files(part: Part, directory: Path | None = None) -> list[Path]:
    """Find the files of a part in a directory, or download them.

    The data set's card says which files a configuration and a split are. Without a card they are found by the hub's
    conventions (`config/split-00000-of-00001.parquet`, `split.jsonl`, ...), and a data set without configurations and
    splits consists of all files at its top.

    Args:
        part: The part.
        directory: Directory of the data set; None downloads it.

    Returns:
        The files, sorted by name.

    Raises:
        InputError: The configuration or split does not exist (the message lists the known ones), the data set does not
            exist or is gated, or the hub cannot be reached.
    """

    def fetch(patterns: Sequence[str]) -> Path:
        return directory if directory is not None else download(part.repository, patterns)

    where = str(directory or part.repository)
    configs = _card_configs(fetch(["README.md"]) / "README.md")
    if not configs:
        return _by_convention(part, fetch, where)
    try:
        patterns = _chosen_patterns(part, configs)
        if files := _matches(fetch(patterns), patterns):
            return files
        raise InputError(f"{part.name}: {where} lacks the files {', '.join(patterns)}")
    except InputError:
        if directory is not None:  # a person may have added files to it that the card does not name
            with suppress(InputError):
                return _by_convention(part, fetch, where)
        raise


def _by_convention(part: Part, fetch: Callable[[Sequence[str]], Path], where: str) -> list[Path]:
    stages = [_conventional_patterns(part)]
    if part.config is None and part.split in (None, "train"):
        stages.append(["*" + suffix for suffix in SUFFIXES])  # tried last, since it downloads everything
    for patterns in stages:
        root = fetch(patterns)
        for pattern in patterns:  # only the first that matches: one split may be there in two formats
            if files := _matches(root, [pattern]):
                return files
    raise InputError(f"{part.name}: {where} has no file for it (looked for {', '.join(stages[0][:3])}); check the name")


def download(repository: str, patterns: Sequence[str]) -> Path:
    """Download the files of a data set that match.

    Args:
        repository: `owner/name` on the hub.
        patterns: Patterns of the files' paths.

    Returns:
        The directory that holds the files.

    Raises:
        InputError: The data set does not exist or is gated, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns)))
    except GatedRepoError:
        raise InputError(
            f"{repository} is gated: ask for access at https://huggingface.co/datasets/{repository} and log in with "
            "`hf auth login`, or name the file that you have"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(f"{repository}: the hub has no such data set, or you may not see it; check the name") from None
    except (LocalEntryNotFoundError, ConnectionError):
        raise InputError(
            f"{repository}: the hub cannot be reached; download the data set and name its file or its directory"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{repository}: the hub refused it: {str(error).splitlines()[0]}") from None


def local_directory(names: Sequence[str], data_dir: Path | None) -> Path | None:
    """Find a named data set's directory: one of its names in `data_dir`, or `data_dir` itself if it has such a name.

    Args:
        names: Names that the directory may have; the first that exists counts.
        data_dir: Directory of data sets, or of this one.

    Returns:
        The directory; None if there is none.
    """
    if data_dir is None:
        return None
    candidates = [data_dir / name for name in names]
    if data_dir.name.lower() in {name.lower() for name in names}:
        candidates.append(data_dir)
    return next((path for path in candidates if is_directory(path)), None)


def _matches(root: Path, patterns: Sequence[str]) -> list[Path]:
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in found if path.suffix in SUFFIXES and path.name not in _NO_DATA and path.is_file())


def _card_configs(card: Path) -> dict[str, Splits]:
    """Return the configurations that a data set's card names; empty if it names none, is broken or does not exist."""
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        metadata = metadata_load(card)
    except (YAMLError, ValueError, RecursionError):
        return {}
    configs = metadata.get("configs") if isinstance(metadata, dict) else None
    return {
        config["config_name"]: _card_splits(config.get("data_files"))
        for config in (configs if isinstance(configs, list) else [])
        if isinstance(config, dict) and isinstance(config.get("config_name"), str) and config.get("data_files")
    }


def _card_splits(files: Any) -> Splits:
    """Return file patterns by split; `data_files` is a pattern, a list of them, or a list of `{"split", "path"}`.

    What is none of these is left out.
    """
    splits: Splits = {}
    for entry in files if isinstance(files, list) else [files]:
        split, paths = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        for path in paths if isinstance(paths, list) else [paths]:
            if not isinstance(split, str) or not isinstance(path, str):
                continue
            pattern = path.removeprefix("./").lstrip("/")
            if pattern and ".." not in path:  # a card is no reason to read other directories
                splits.setdefault(split, []).append(pattern)
    return splits


def _chosen_patterns(part: Part, configs: dict[str, Splits]) -> list[str]:
    config, split = part.config, part.split
    if config is not None and config not in configs and split is None and len(configs) == 1:
        (only,) = configs
        if config in configs[only]:  # hub:owner/name:split
            config, split = only, config
    if config is None:
        config = "default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None
    splits = configs[_one_of(config, configs, part.name, "configuration")]
    if split is None:
        split = "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None
    return splits[_one_of(split, splits, part.name, "split")]


def _one_of(name: str | None, known: dict[str, Any], whole: str, what: str) -> str:
    some = ", ".join(sorted(known))
    if name is None:
        raise InputError(f"{whole}: which {what}? There are {some}; add one after a colon")
    if name not in known:
        raise InputError(f"{whole}: no {what} {name!r}{nearest(name, known) or ';'} there are {some}")
    return name


def _conventional_patterns(part: Part) -> list[str]:
    split = part.split or "train"
    if part.config is None:
        stems = [f"data/{split}-*", f"{split}-*", f"data/{split}", split]
    else:
        stems = [f"{part.config}/{split}-*", f"{part.config}/{split}", f"{part.config}/{split}/*"]
        if split == "train":
            stems += [part.config, f"{part.config}/*"]
    return [stem + suffix for stem in stems for suffix in SUFFIXES]
