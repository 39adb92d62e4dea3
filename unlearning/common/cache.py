"""Where results are kept that later runs may find again; every file there is named by a hash of all it depends on."""

import os
from pathlib import Path


def cache_directory(kind: str) -> Path:
    """A directory for one kind of result: in $UNLEARNING_CACHE, or in `unlearning` of the user's cache directory."""
    named = os.environ.get("UNLEARNING_CACHE")
    if named:
        return Path(named) / kind
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "unlearning" / kind
