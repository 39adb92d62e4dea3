"""The site builds strictly and without the network, and holds all that its pages load."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT


@pytest.mark.slow
def test_site_builds_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    environment = os.environ | {"DOCS_NOTEBOOKS": "0", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):  # whatever asks the network, fails
        environment[proxy] = "http://127.0.0.1:9"
    for arguments in (
        ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        [str(ROOT / "docs" / "hooks" / "check_site.py"), str(tmp_path / "site")],
    ):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "notebooks" / "07_erased_or_suppressed.html").is_file()
