"""Before torch is imported: the settings that the command lines make for themselves."""

import os
import signal
import tempfile

import pytest
from hypothesis import settings

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_CACHE = tempfile.TemporaryDirectory(prefix="unlearning-cache-")  # gone when Python ends

# A shell starts what it runs in the background deaf to Ctrl-C, and tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# No test reaches for the network; what would, fails at once instead of after a minute of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The reference model's constants of test models, which nobody needs again.
os.environ["UNLEARNING_CACHE"] = _CACHE.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks come first, since they take longest."""
    items.sort(key=lambda item: "notebooks" not in item.path.parts)
