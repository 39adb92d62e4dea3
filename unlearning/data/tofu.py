"""TOFU (2401.06121): questions and answers about fictitious authors; a split is a configuration of the hub's data set.

Locally: the repository's files, `tofu/forget05.json` and so on, which are JSON lines.
"""

from pathlib import Path

from unlearning.data.hub import Part, local_directory
from unlearning.data.named import Found, read_part
from unlearning.errors import InputError
from unlearning.options import nearest

REPOSITORY = "locuslab/TOFU"
DIRECTORIES = ("tofu", "TOFU")

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
    """The records of a split.

    Raises:
        InputError: there is no such split, or it is neither here nor on the hub.
    """
    directory = local_directory(DIRECTORIES, data_dir)
    own = [path.stem for path in directory.glob("*.json")] if directory else []
    known = sorted({*SPLITS, *own})
    if split not in known:
        raise InputError(f"tofu:{split}: no such split{nearest(split, known) or ';'} there are {', '.join(known)}")
    part = Part(f"tofu:{split}", REPOSITORY, split)
    return read_part(part, DIRECTORIES, data_dir, remote=part)
