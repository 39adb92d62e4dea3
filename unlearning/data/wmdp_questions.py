"""The questions of WMDP (2403.03218): biology 1273, chemistry 408, cybersecurity 1987.

Locally: `wmdp/bio_questions.json` and so on, as the authors hand them out, or a copy of the hub's data set.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from unlearning.common.errors import InputError, nearest
from unlearning.data.hub import Part, find_files, local_directory
from unlearning.data.named import read_files, read_part
from unlearning.data.records import Record

SUBJECTS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
"""Subject that the prompt names, by set."""

_DIRECTORIES = ("wmdp", "wmdp-mcqs", "WMDP")


def read(name: str, data_dir: Path | None) -> list[Record]:
    """Read the records of one set of questions.

    Args:
        name: `bio`, `chem` or `cyber`.
        data_dir: Directory of data sets; the hub is asked for what it lacks.

    Returns:
        The records.

    Raises:
        InputError: The set does not exist, or is neither in the directory nor on the hub.
    """
    if name not in SUBJECTS:
        hint = nearest(name, SUBJECTS) or ";"
        raise InputError(f"wmdp:{name}: no such set of questions{hint} there are {', '.join(SUBJECTS)}")
    remote = Part(f"wmdp:{name}", "cais/wmdp", f"wmdp-{name}", "test")
    directory = local_directory(_DIRECTORIES, data_dir)
    files = []
    if directory is not None:
        with suppress(InputError):  # the directory has the hub's layout, which is read below
            files = find_files(replace(remote, config=None, split=f"{name}_questions"), directory)
    if files:
        return read_files(files)
    return read_part(remote, _DIRECTORIES, data_dir, remote=remote).records
