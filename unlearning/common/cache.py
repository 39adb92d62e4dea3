"""The directory of results that later runs may find again; a hash of all that a result depends on names its file."""

import os
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """Return the directory of one kind of result.

    Args:
        kind: Name of the kind.

    Returns:
        The directory, in $UNLEARNING_CACHE if that is set, else in `unlearning` of the user's cache directory.
    """
    named = os.environ.get("UNLEARNING_CACHE")
    if named:
        return Path(named) / kind
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "unlearning" / kind
