"""Links that lead nowhere, as in a hub cache that was copied without the files its links lead to."""

from pathlib import Path

from unlearning.common.errors import InputError


def check_links(directory: Path, *names: str) -> None:
    """Check that no file that is missed is a link that leads nowhere.

    Args:
        directory: Directory of a checkpoint.
        names: Names of files in it.

    Raises:
        InputError: One is such a link.
    """
    for file in (directory / name for name in names):
        if file.is_symlink() and not file.exists():
            raise InputError(
                f"{file}: is a link to {file.readlink()}, where there is nothing; copy the checkpoint with its links "
                "followed (cp -rL), or download it again"
            )
