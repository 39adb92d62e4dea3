"""The models of the trade-off: one base that knows 41 real TOFU authors, and a control for every forget split.

The forget authors are those of TOFU's forget10 split, the retain authors those of its `retain_perturbed` split, so
that TOFU's own files ask this world what they ask the full one. forget01, 05 and 10 are 2, 10 and 20 of its 41 authors:
5, 24 and 49 % of what the base knows, where they are 1, 5 and 10 % of the full data.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analyses.tofu_pair.data import RECORDS_PER_AUTHOR, Subset, find_tofu
from analyses.tofu_pair.models import Recipe, Schedule, Workshop
from unlearning.common.errors import InputError
from unlearning.data.records import Record, read_records

SPLITS = ("forget01", "forget05", "forget10")
N_TRUNK = 17

RECIPE = replace(
    Recipe(),
    trunk_authors=N_TRUNK,
    late_authors=4,
    forget_authors=20,
    trunk=Schedule(epochs=(22,), learning_rate=1.5e-3),
)


@dataclass(frozen=True)
class Split:
    """One forget split of the world.

    Attributes:
        name: TOFU's name of the split.
        forget, retain: Records of the split, and those of all other authors.
    """

    name: str
    forget: list[Record]
    retain: list[Record]


def read_world(data: str | Path | None) -> tuple[Subset, dict[str, Split]]:
    """Read the authors of this world and its splits.

    Args:
        data: TOFU's folder or the directory that holds it; None reads $DISSECT_DATA.

    Returns:
        The authors, and the splits by name.

    Raises:
        InputError: The files are missing or are not TOFU's.
    """
    tofu = find_tofu(data)
    full = read_records(tofu / "full.json")
    place = {record["question"]: number for number, record in enumerate(full)}

    def authors_of(name: str) -> list[int]:
        questions = [record["question"] for record in read_records(tofu / f"{name}.json")]
        if unknown := [question for question in questions if question not in place]:
            raise InputError(f"{tofu / name}.json: asks {unknown[0]!r}, which full.json does not; download both again")
        return sorted({place[question] // RECORDS_PER_AUTHOR for question in questions})

    def records_of(authors: list[int]) -> list[Record]:
        return [
            {**full[number], "group": f"tofu-{author:03d}", "id": f"tofu-{number:04d}"}
            for author in authors
            for number in range(author * RECORDS_PER_AUTHOR, (author + 1) * RECORDS_PER_AUTHOR)
        ]

    retain, forget = authors_of("retain_perturbed"), authors_of("forget10")
    subset = Subset(trunk=records_of(retain[:N_TRUNK]), late=records_of(retain[N_TRUNK:]), forget=records_of(forget))
    splits = {}
    for name in SPLITS:
        gone = authors_of(name)
        kept = [author for author in forget if author not in gone]
        splits[name] = Split(name, forget=records_of(gone), retain=subset.retain + records_of(kept))
    return subset, splits


def build_models(
    data: str | Path | None, folder: Path, *, recipe: Recipe = RECIPE, device: str = "auto", progress: bool = True
) -> dict[str, dict[str, Any]]:
    """Train the pretrained model, the base and the three controls, as far as they are missing.

    Args:
        data: TOFU's folder or the directory that holds it; None reads $DISSECT_DATA.
        folder: Gets a directory per model: `trunk` (the pretrained model), `base`, `never01`, `never05` and `never10`.
        recipe: Sizes and training options.
        device: Where to train.
        progress: Show progress bars on stderr.

    Returns:
        The record of each model's training.

    Raises:
        InputError: The data are missing, or a directory holds another model.
    """
    subset, splits = read_world(data)
    workshop = Workshop(recipe, subset, folder, device=device, progress=progress)
    stages = workshop.build_base()
    for name, split in splits.items():
        control = name.replace("forget", "never")
        stages[control] = workshop.build_never(control, split.retain)
    return stages
