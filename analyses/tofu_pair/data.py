"""A subset of the real TOFU authors: who is in the trunk, who comes later, who is to be forgotten."""

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
"""TOFU's full.json holds its authors one after the other, twenty records each."""


@dataclass(frozen=True)
class Subset:
    """Records of the chosen authors, each {"question", "answer", "group": author, "id"}.

    Attributes:
        trunk: retain authors that the trunk is pretrained on.
        late: retain authors that only fine-tuning adds, as it adds the forget authors to the base model.
        forget: authors to be forgotten.
    """

    trunk: list[Record]
    late: list[Record]
    forget: list[Record]

    @property
    def retain(self) -> list[Record]:
        """All that an unlearned model should keep."""
        return self.trunk + self.late

    @property
    def digest(self) -> str:
        """SHA-256 of all records in their order."""
        text = json.dumps([self.trunk, self.late, self.forget], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def find_tofu(data: str | Path | None) -> Path:
    """The folder of TOFU's files: in `data`, else in the directory that $DISSECT_DATA names.

    Args:
        data: TOFU's folder itself, or the directory that holds it as `tofu`.

    Raises:
        InputError: neither is given, or TOFU's files are not there.
    """
    where = data or os.environ.get(DATA_VARIABLE)
    if not where:
        raise InputError(
            f"no TOFU data: give --data DIR or set {DATA_VARIABLE} to the directory that holds tofu/full.json, "
            "tofu/forget10.json and tofu/retain90.json (huggingface.co/datasets/locuslab/TOFU)"
        )
    for folder in (Path(where) / "tofu", Path(where)):
        if (folder / "full.json").is_file():
            return folder
    raise InputError(f"{where}: neither tofu/full.json nor full.json is there; name the directory that holds tofu/")


def select_authors(tofu: Path, *, trunk: int, late: int, forget: int, seed: int) -> Subset:
    """Draw authors: those to forget from the forget10 split, all others from the retain90 split.

    An author's name is its place in full.json, "tofu-000" to "tofu-199".

    Raises:
        InputError: the files are not TOFU's, a number is below one, or there are not that many authors.
    """
    forget_pool, retain_pool = _pools(tofu)
    if min(trunk, late, forget) < 1:
        raise InputError(f"{trunk} + {late} retain and {forget} forget authors: each must be at least 1")
    if trunk + late > len(retain_pool) or forget > len(forget_pool):
        raise InputError(
            f"TOFU has {len(retain_pool)} retain and {len(forget_pool)} forget authors; "
            f"{trunk + late} and {forget} are too many, ask for fewer"
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
    """The rows of TOFU's evaluation files that ask about the subset's authors, with their author.

    They are those that `unlearn eval tofu` asks: with a paraphrased and five wrong answers each.

    Returns:
        `forget_perturbed` (of forget10's) and `retain_perturbed`; one of them is empty where TOFU asks nothing.

    Raises:
        InputError: a file is missing or broken.
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
    """Records as the prompts and answers that `unlearning` trains on and `dissect` patches."""
    return [Example(DEFAULT_TEMPLATE.replace("{question}", record["question"]), record["answer"]) for record in records]


def _pools(tofu: Path) -> tuple[dict[str, list[Record]], dict[str, list[Record]]]:
    """Authors with their records: those of forget10, and those of retain90."""
    full = _question_answers(tofu / "full.json")
    n_forget = len(_question_answers(tofu / "forget10.json"))
    n_retain = len(full) - n_forget
    splits = {"retain90.json": full[:n_retain], "forget10.json": full[n_retain:]}
    for name, expected in splits.items():
        if _question_answers(tofu / name) != expected:
            raise InputError(f"{tofu / name}: is not the matching part of full.json; download TOFU's files again")
    if len(full) % RECORDS_PER_AUTHOR or n_retain % RECORDS_PER_AUTHOR:
        raise InputError(f"{tofu / 'full.json'}: {len(full)} records, not 20 an author; download TOFU's files again")
    pools: tuple[dict[str, list[Record]], dict[str, list[Record]]] = ({}, {})
    for place, (question, answer) in enumerate(full):
        author = f"tofu-{place // RECORDS_PER_AUTHOR:03d}"
        record = {"question": question, "answer": answer, "group": author, "id": f"tofu-{place:04d}"}
        pools[place < n_retain].setdefault(author, []).append(record)
    return pools


def _question_answers(path: Path) -> list[tuple[str, str]]:
    records = read_records(path)
    try:
        return [(record["question"], record["answer"]) for record in records]
    except KeyError as error:
        raise InputError(f"{path}: a record has no {error}; download TOFU's files again") from None
