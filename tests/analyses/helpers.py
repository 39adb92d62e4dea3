"""TOFU's files, real where they are and imitated where only their shape matters."""

import json
import os
from pathlib import Path

import pytest

from analyses.tofu_pair.data import DATA_VARIABLE, find_tofu
from unlearning.common.errors import InputError


def real_tofu() -> Path | None:
    """The real TOFU files' folder, or None."""
    try:
        return find_tofu(os.environ.get(DATA_VARIABLE))
    except InputError:
        return None


needs_tofu = pytest.mark.skipif(
    real_tofu() is None, reason=f"the real TOFU data is not here: set {DATA_VARIABLE} to the directory that holds tofu/"
)


def write_imitation(folder: Path, *, retain_authors: int = 12, forget_authors: int = 4) -> Path:
    """Files with TOFU's names and layout, twenty invented records an author."""
    folder.mkdir(parents=True)
    records = [
        {"question": f"What is fact {fact} of author {author}?", "answer": f"It is thing {author * 100 + fact}."}
        for author in range(retain_authors + forget_authors)
        for fact in range(20)
    ]
    cut = retain_authors * 20
    for name, part in (("full", records), ("retain90", records[:cut]), ("forget10", records[cut:])):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, part)) + "\n", encoding="utf-8")
    return folder
