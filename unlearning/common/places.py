"""What is at a path: asked before anything is opened, since a pipe or a device may keep its reader for ever.

Users type texts that can be no path too: too long, or with a NUL.
"""

import errno
import os
import stat
from pathlib import Path

from unlearning.common.errors import InputError


def kind_of(path: Path) -> str:
    """Return what is at a path, links followed.

    Args:
        path: The path.

    Returns:
        `file`, `directory`, `nothing`, `link that leads nowhere`, or `pipe, socket or device`.

    Raises:
        InputError: Nothing can have such a name, or one of its directories may not be read.

    Examples:
        >>> kind_of(Path("/")), kind_of(Path("/dev/null")), kind_of(Path("/no/such/file"))
        ('directory', 'pipe, socket or device', 'nothing')
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "link that leads nowhere" if path.is_symlink() else "nothing"
    except ValueError:
        raise InputError(f"{str(path)[:100]!r}: no path may hold a NUL sign; give another one") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "link that leads nowhere"
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
        raise InputError(f"{shown}: cannot be read: {error.strerror}; give another path") from None
    if stat.S_ISREG(mode):
        return "file"
    return "directory" if stat.S_ISDIR(mode) else "pipe, socket or device"


def is_there(path: str | Path) -> bool:
    """Return whether there is a file or a directory; Path.exists raises OSError for a name that is too long."""
    return os.path.exists(path)


def is_directory(path: str | Path) -> bool:
    """Return whether there is a directory (see `is_there`)."""
    return os.path.isdir(path)
