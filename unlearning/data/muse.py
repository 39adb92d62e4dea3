"""MUSE (2407.06460): news articles or novels as documents, with questions and continuations about them.

Locally: a copy of the hub's data set under `muse-news` or `muse-books` (`raw/forget-00000-of-00001.parquet`), or the
same parts in other formats (`raw/forget.txt`, `knowmem/forget_qa.json`), under `news` or `books` too; or the files of
MUSE's repository, where the corpora are `bbc` and `hp` and what the hub calls `retain` is `retain2`.
"""

from dataclasses import replace
from pathlib import Path

from unlearning.common.errors import InputError, nearest
from unlearning.data.hub import Part, local_directory
from unlearning.data.named import Found, read_part

_FOUR = ("forget_1", "forget_2", "forget_3", "forget_4")

_BOTH = {
    "raw": ("forget", "retain1", "retain2", "holdout"),
    "train": ("forget", "retain1", "retain2"),
    "knowmem": ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl"),
    "verbmem": ("forget",),
    "privleak": ("forget", "retain", "holdout"),
}

PARTS: dict[str, dict[str, tuple[str, ...]]] = {"News": {**_BOTH, "scal": _FOUR, "sust": _FOUR}, "Books": _BOTH}
"""Splits by configuration, of each corpus: the forget sets of `scal` are nested, those of `sust` disjoint."""

_DIRECTORIES = {"News": ("muse-news", "MUSE-News", "news", "bbc"), "Books": ("muse-books", "MUSE-Books", "books", "hp")}


def read(corpus: str, name: str, data_dir: Path | None) -> Found:
    """Read the records of one split of a corpus.

    Args:
        corpus: `News` or `Books`.
        name: `config:split`, such as `raw:forget`; a configuration with one split needs no split.
        data_dir: Directory of data sets; the hub is asked for what it lacks.

    Returns:
        The records and their source.

    Raises:
        InputError: The part does not exist (the message lists the known ones), or is neither in the directory nor on
            the hub.
    """
    whole = f"muse-{corpus.lower()}:{name}"
    configs = PARTS[corpus]
    config, _, split = name.partition(":")
    if config not in configs:
        hint = nearest(config, configs) or ";"
        raise InputError(f"{whole}: no configuration {config!r}{hint} there are {', '.join(configs)}")
    splits = configs[config]
    if not split and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        problem = f"no split {split!r}{nearest(split, splits) or ';'} there are" if split else "which split? There are"
        raise InputError(f"{whole}: {problem} {', '.join(f'{config}:{known}' for known in splits)}")
    part = Part(whole, f"muse-bench/MUSE-{corpus}", config, split)
    directories = _DIRECTORIES[corpus]
    local = replace(part, split=_local_split(local_directory(directories, data_dir), config, split))
    return read_part(local, directories, data_dir, remote=part)


def _local_split(directory: Path | None, config: str, split: str) -> str:
    """Return a split's name in a directory, which may have the layout of MUSE's repository."""
    if directory is None or config not in ("knowmem", "privleak") or not split.startswith("retain"):
        return split
    theirs = split.replace("retain", "retain2")
    has = {file.name.partition("-")[0].partition(".")[0] for file in (directory / config).glob("*")}
    return theirs if theirs in has and split not in has else split
