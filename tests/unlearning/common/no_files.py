"""What may stand in the place of a file and is none."""

import os
from pathlib import Path

KINDS = ["pipe", "directory", "device", "nothing", "itself"]
"""The last three are links: to a device, to nothing, and to themselves."""


def make(what: str, path: Path) -> None:
    """Put one of `KINDS` at a path."""
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "nothing": "nowhere"}.get(what, path.name))
