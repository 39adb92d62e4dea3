"""What all readers of named data sets share: the directory, the hub, and the records with their source."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.common.places import is_directory
from unlearning.data.documents import read_text_documents
from unlearning.data.hub import Part, find_files, local_directory
from unlearning.data.question_answer import DEFAULT_TEMPLATE
from unlearning.data.records import Record, read_records

DATA_VARIABLE = "DISSECT_DATA"


class AbsentData(InputError):
    """A part of a data set that is neither in the local directory nor on the hub."""


@dataclass(frozen=True)
class Found:
    """Records and their source.

    Attributes:
        records: Records of any of the shapes that `question_answer.examples_of` reads.
        source: The files.
        template: Prompt around a question if the user sets none.
        notes: Remarks for a reader of the run, one line each.
    """

    records: list[Record]
    source: str
    template: str = DEFAULT_TEMPLATE
    notes: tuple[str, ...] = ()


def read_files(files: list[Path]) -> list[Record]:
    """Read the records of files of any format, one after another."""
    return [record for file in files for record in read_file(file)]


def read_file(path: Path) -> list[Record]:
    """Read the records of one file, or the texts of one directory."""
    if path.suffix.lower() == ".txt" or is_directory(path):
        return read_text_documents(path)
    return read_records(path)


def read_part(local: Part, directory_names: tuple[str, ...], data_dir: Path | None, *, remote: Part) -> Found:
    """Read a part of a named data set from `data_dir`, or else from the hub.

    Args:
        local: The part, as the directory names it.
        directory_names: Names that the data set's directory may have.
        data_dir: Directory of data sets, or None.
        remote: The part, as the hub names it.

    Returns:
        The records and their source.

    Raises:
        AbsentData: The part is neither in the directory nor on the hub.
    """
    directory = local_directory(directory_names, data_dir)
    files = []
    if directory is not None:
        with suppress(InputError):  # the directory lacks this part; the hub may have it
            files = find_files(local, directory)
    if files:
        return Found(read_files(files), ", ".join(map(str, files)))
    try:
        files = find_files(remote)
    except InputError as error:
        here = f"{data_dir} does not hold it" if data_dir else f"neither `data_dir` nor ${DATA_VARIABLE} is set"
        raise AbsentData(f"{local.name}: {here}; {error}") from None
    return Found(read_files(files), f"{remote.repository} ({', '.join(file.name for file in files)})")


def data_directory(data_dir: str | Path | None) -> Path | None:
    """Return the directory of data sets.

    Args:
        data_dir: The directory; None takes $DISSECT_DATA.

    Returns:
        The directory; None if neither is set.

    Raises:
        InputError: The directory does not exist.
    """
    named = data_dir or os.environ.get(DATA_VARIABLE)
    if not named:
        return None
    path = Path(named)
    if not is_directory(path):
        name = "`data_dir`" if data_dir else f"${DATA_VARIABLE}"
        raise InputError(
            f"{name} must be the directory that holds tofu/, muse-news/, ..., got {path}: no such directory"
        )
    return path
