"""Questions about paths that users type, for texts that can be no path too: too long, or with a NUL."""

import os
from pathlib import Path


def is_there(path: str | Path) -> bool:
    """Return whether there is a file or a directory; Path.exists raises OSError for a name that is too long."""
    return os.path.exists(path)


def is_directory(path: str | Path) -> bool:
    """Return whether there is a directory (see `is_there`)."""
    return os.path.isdir(path)
