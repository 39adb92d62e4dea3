"""Before torch is imported: the settings that the command lines make for themselves."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# No test reaches for the network; what would, fails at once instead of after a minute of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
