"""TOFU (2401.06121): questions and answers about fictitious authors; a split is a configuration of the hub's data set.

Locally: the repository's files, `tofu/forget05.json` and so on, which are JSON lines. Splits of other sizes (forget20,
retain80) are cut from `full`, whose last authors are the forget authors of every size, as in the files that were
published with NPO.
"""

import re
from pathlib import Path

from unlearning.common.errors import InputError, nearest
from unlearning.data.hub import Part, local_directory
from unlearning.data.named import Found, read_part

REPOSITORY = "locuslab/TOFU"
DIRECTORIES = ("tofu", "TOFU")
ROWS_PER_AUTHOR = 20

SPLITS = (
    "full",
    *(f"{kind}{size}" for kind in ("forget", "holdout") for size in ("01", "05", "10")),
    *(f"retain{size}" for size in ("99", "95", "90")),
    *(f"forget{size}_perturbed" for size in ("01", "05", "10")),
    "retain_perturbed",
    "real_authors",
    "real_authors_perturbed",
    "world_facts",
    "world_facts_perturbed",
)


def read(split: str, data_dir: Path | None) -> Found:
    """Read the records of a split.

    Args:
        split: Name of the split, such as `forget05`.
        data_dir: Directory of data sets; the hub is asked for what it lacks.

    Returns:
        The records and their source.

    Raises:
        InputError: The split does not exist, or is neither in the directory nor on the hub.
    """
    known = _known(data_dir)
    if split not in known:
        share = re.fullmatch(r"(forget|retain)(\d\d)", split)
        if share is None or share[2] == "00":
            some = f"{', '.join(known)}; forget02 to forget99 and their retain98 to retain01 are cut from full"
            raise InputError(f"tofu:{split}: no such split{nearest(split, known) or ';'} there are {some}")
        return _cut(share[1], int(share[2]), data_dir)
    part = Part(f"tofu:{split}", REPOSITORY, split)
    return read_part(part, DIRECTORIES, data_dir, remote=part)


def read_perturbed(split: str, data_dir: Path | None) -> Found:
    """Read the records of a forget split, with paraphrases and perturbed answers if a file has them.

    Args:
        split: Name of the split, such as `forget05`.
        data_dir: Directory of data sets; the hub is asked for what it lacks.

    Returns:
        The records and their source.

    Raises:
        InputError: The split does not exist, or is neither in the directory nor on the hub.
    """
    perturbed = f"{split}_perturbed"
    return read(perturbed if perturbed in _known(data_dir) else split, data_dir)


def author(row: int) -> str:
    """Return the name of a row's author: every twenty rows in succession are one author's."""
    return f"author-{row // ROWS_PER_AUTHOR:03d}"


def _known(data_dir: Path | None) -> list[str]:
    directory = local_directory(DIRECTORIES, data_dir)
    own = [path.stem for path in directory.glob("*.json")] if directory else []
    return sorted({*SPLITS, *own})


def _cut(kind: str, percent: int, data_dir: Path | None) -> Found:
    """Cut the last authors, or for a retain split the first ones, from the full data set."""
    full = read("full", data_dir)
    n_authors, rest = divmod(len(full.records), ROWS_PER_AUTHOR)
    if rest or n_authors * percent % 100:
        raise InputError(
            f"tofu:{kind}{percent:02d}: {percent} % of the {len(full.records)} rows of full is not a whole number of "
            f"authors of {ROWS_PER_AUTHOR} rows; get TOFU's files again"
        )
    n = n_authors * percent // 100 * ROWS_PER_AUTHOR
    records, side = (full.records[-n:], "last") if kind == "forget" else (full.records[:n], "first")
    return Found(records, full.source, notes=(f"{kind}{percent:02d} is the {side} {n} rows of full",))
