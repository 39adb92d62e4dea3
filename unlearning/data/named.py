"""What the readers of named data sets give back."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data.documents import read_text_documents
from unlearning.data.hub import Part, find_files, local_directory
from unlearning.data.question_answer import DEFAULT_TEMPLATE
from unlearning.data.records import Record, read_records

DATA_VARIABLE = "DISSECT_DATA"


class AbsentData(InputError):
    """A part of a data set that is neither here nor on the hub."""


@dataclass(frozen=True)
class Found:
    """Records and where they came from.

    Attributes:
        records: of any of the shapes that `question_answer.examples_of` reads.
        source: the files.
        template: what wraps the questions where the user has no wish.
        notes: what a reader of the run should know.
    """

    records: list[Record]
    source: str
    template: str = DEFAULT_TEMPLATE
    notes: tuple[str, ...] = ()


def read_files(files: list[Path]) -> list[Record]:
    """The records of files of any format, one after another."""
    return [record for file in files for record in read_file(file)]


def read_file(path: Path) -> list[Record]:
    """The records of one file, or the texts of one directory."""
    if path.suffix.lower() == ".txt" or path.is_dir():
        return read_text_documents(path)
    return read_records(path)


def read_part(local: Part, directory_names: tuple[str, ...], data_dir: Path | None, *, remote: Part) -> Found:
    """A part of a named data set: from `data_dir` where it holds it, else from the hub.

    Args:
        local: what it is called in the directory.
        directory_names: what the directory may be called.
        data_dir: may hold it.
        remote: what it is called on the hub.

    Raises:
        AbsentData: it is neither here nor there.
    """
    directory = local_directory(directory_names, data_dir)
    files = []
    if directory is not None:
        with suppress(InputError):  # a part that this directory lacks
            files = find_files(local, directory)
    if files:
        return Found(read_files(files), ", ".join(map(str, files)))
    try:
        files = find_files(remote)
    except InputError as error:
        place = f"{data_dir} does not hold it" if data_dir else f"no data_dir (nor ${DATA_VARIABLE}) is named"
        raise AbsentData(f"{local.name}: {place}; {error}") from None
    return Found(read_files(files), f"{remote.repository} ({', '.join(file.name for file in files)})")


def data_directory(data_dir: str | Path | None) -> Path | None:
    """The directory of data sets: the one given, else the one that $DISSECT_DATA names, else none.

    Raises:
        InputError: it is no directory.
    """
    named = data_dir or os.environ.get(DATA_VARIABLE)
    if not named:
        return None
    path = Path(named)
    if not path.is_dir():
        where = "data_dir" if data_dir else f"${DATA_VARIABLE}"
        raise InputError(f"{where}={path}: no such directory; name the one that holds tofu/, muse-news/, ...")
    return path
