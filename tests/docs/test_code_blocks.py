"""Every code block of README and docs runs, or is at least checked by the real parsers."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import (
    PAGES,
    Block,
    blocks_of,
    calls_of,
    check_call,
    registries_restored,
    run_call,
    run_python,
)


def pages_with(which: Callable[[Block], bool]) -> list[str]:
    return [page for page in PAGES if any(which(block) for block in blocks_of(page))]


def run(page: str, scratch: Path, *, slow: bool) -> None:
    """Run the blocks of a page in order, in the present directory."""
    namespace: dict[str, Any] = {"__name__": page}
    with registries_restored():
        for block in blocks_of(page):
            if block.not_run is not None or (block.slow and not slow):
                continue
            if block.language == "python":
                run_python(block, namespace)
            else:
                for words in calls_of(block.code, scratch):
                    run_call(words)


@pytest.mark.parametrize("page", pages_with(lambda block: block.not_run is None and not block.slow))
def test_page_runs(page: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    run(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(lambda block: block.slow))
def test_page_runs_with_its_slow_blocks(
    page: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    run(page, tmp_path, slow=True)


@pytest.mark.parametrize("page", pages_with(lambda _block: True))
def test_every_block_is_sound(page: str, tmp_path: Path) -> None:
    for block in blocks_of(page):
        if block.language == "python":
            ast.parse(block.code, filename=page)
        else:
            calls = calls_of(block.code, tmp_path)
            assert calls, f"{page}:{block.line} calls nothing"
            for words in calls:
                check_call(words)
