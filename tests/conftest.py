"""Before torch is imported: the settings that the command lines make for themselves."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test reaches for the network; what would, fails at once instead of after a minute of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
