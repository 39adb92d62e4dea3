"""A subset of the real TOFU authors: those of the pretrained model, those added later, and those to be forgotten."""

import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.question_answer import DEFAULT_TEMPLATE, Example
from unlearning.data.records import Record, read_records

DATA_VARIABLE = "DISSECT_DATA"
RECORDS_PER_AUTHOR = 20
"""TOFU's full.json holds its authors one after the other, with twenty records each."""


@dataclass(frozen=True)
class Subset:
    """Records of the chosen authors, each {"question", "answer", "group": author, "id"}.

    Attributes:
        trunk: Records of the retain authors on which the pretrained model is trained.
        late: Records of the retain authors that only fine-tuning adds, as it adds the forget authors to the base.
        forget: Records of the authors to be forgotten.
    """

    trunk: list[Record]
    late: list[Record]
    forget: list[Record]

    @property
    def retain(self) -> list[Record]:
        """Everything that an unlearned model should keep."""
        return self.trunk + self.late

    @property
    def digest(self) -> str:
        """SHA-256 of all records in their order."""
        text = json.dumps([self.trunk, self.late, self.forget], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def find_tofu(data: str | Path | None) -> Path:
    """Find the folder of TOFU's files: in `data`, else in the directory that $DISSECT_DATA names.

    Args:
        data: TOFU's folder itself, or the directory that holds it as `tofu`.

    Returns:
        The folder.

    Raises:
        InputError: Neither is given, or TOFU's files are missing.
    """
    where = data or os.environ.get(DATA_VARIABLE)
    if not where:
        raise InputError(
            f"`data` must be given, or {DATA_VARIABLE} must be set to the directory that holds tofu/full.json, "
            "tofu/forget10.json and tofu/retain90.json (huggingface.co/datasets/locuslab/TOFU)"
        )
    for folder in (Path(where) / "tofu", Path(where)):
        if (folder / "full.json").is_file():
            return folder
    raise InputError(f"{where}: must hold tofu/full.json or full.json. Give the directory that holds tofu/")


def select_authors(tofu: Path, *, trunk: int, late: int, forget: int, seed: int) -> Subset:
    """Draw authors: those to forget from the forget10 split, all others from the retain90 split.

    Authors are named by their index in full.json, "tofu-000" to "tofu-199".

    Args:
        tofu: The folder of TOFU's files.
        trunk: Number of retain authors of the pretrained model.
        late: Number of retain authors that fine-tuning adds.
        forget: Number of authors to forget.
        seed: Random seed of the draw.

    Returns:
        The records of the drawn authors.

    Raises:
        InputError: The files are not TOFU's, a number is below one, or there are not enough authors.
    """
    forget_pool, retain_pool = _pools(tofu)
    if min(trunk, late, forget) < 1:
        raise InputError(
            f"each number of authors must be at least 1, got {trunk} + {late} to retain and {forget} to forget"
        )
    if trunk + late > len(retain_pool) or forget > len(forget_pool):
        raise InputError(
            f"TOFU has {len(retain_pool)} retain and {len(forget_pool)} forget authors; "
            f"{trunk + late} and {forget} were asked for. Give fewer"
        )
    draw = random.Random(seed)
    retain_authors = draw.sample(sorted(retain_pool), trunk + late)
    forget_authors = draw.sample(sorted(forget_pool), forget)

    def records(pool: dict[str, list[Record]], authors: list[str]) -> list[Record]:
        return [record for author in sorted(authors) for record in pool[author]]

    return Subset(
        trunk=records(retain_pool, retain_authors[:trunk]),
        late=records(retain_pool, retain_authors[trunk:]),
        forget=records(forget_pool, forget_authors),
    )


def perturbed(tofu: Path, subset: Subset) -> dict[str, list[Record]]:
    """Return the rows of TOFU's evaluation files that ask about the subset's authors, with their author.

    `unlearn eval tofu` asks these rows: each has a paraphrased answer and five wrong answers.

    Args:
        tofu: The folder of TOFU's files.
        subset: The drawn authors.

    Returns:
        `forget_perturbed` (of forget10's) and `retain_perturbed`; a list is empty if TOFU asks nothing about the
        authors.

    Raises:
        InputError: A file is missing or broken.
    """
    found = {}
    for name, file, known in (
        ("forget_perturbed", "forget10_perturbed", subset.forget),
        ("retain_perturbed", "retain_perturbed", subset.retain),
    ):
        groups = {(record["question"], record["answer"]): record["group"] for record in known}
        rows = [
            (record, groups.get((record["question"], record["answer"])))
            for record in read_records(tofu / f"{file}.json")
        ]
        found[name] = [{**record, "group": group} for record, group in rows if group is not None]
    return found


def as_examples(records: list[Record]) -> list[Example]:
    """Return records as the prompts and answers that `unlearning` trains on and `dissect` patches."""
    return [Example(DEFAULT_TEMPLATE.replace("{question}", record["question"]), record["answer"]) for record in records]


def _pools(tofu: Path) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Return the authors of forget10 and those of retain90, with their records."""
    full = _question_answers(tofu / "full.json")
    n_forget = len(_question_answers(tofu / "forget10.json"))
    n_retain = len(full) - n_forget
    splits = {"retain90.json": full[:n_retain], "forget10.json": full[n_retain:]}
    for name, expected in splits.items():
        if _question_answers(tofu / name) != expected:
            raise InputError(f"{tofu / name}: must be the matching part of full.json. Download TOFU's files again")
    if len(full) % RECORDS_PER_AUTHOR or n_retain % RECORDS_PER_AUTHOR:
        raise InputError(
            f"{tofu / 'full.json'}: {len(full)} records, but must have 20 per author. Download TOFU's files again"
        )
    pools: tuple[dict[str, list[Record]], dict[str, list[Record]]] = ({}, {})
    for index, (question, answer) in enumerate(full):
        author = f"tofu-{index // RECORDS_PER_AUTHOR:03d}"
        record = {"question": question, "answer": answer, "group": author, "id": f"tofu-{index:04d}"}
        pools[index < n_retain].setdefault(author, []).append(record)
    return pools


def _question_answers(path: Path) -> list[tuple[str, str]]:
    records = read_records(path)
    try:
        return [(record["question"], record["answer"]) for record in records]
    except KeyError as error:
        raise InputError(f"{path}: a record lacks {error}. Download TOFU's files again") from None
