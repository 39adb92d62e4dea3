"""What the pages promise: short, complete, and without dead links."""

import importlib
import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

import dissect
import unlearning
from tests.command_lines import call_main
from tests.docs.blocks import PAGES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """Return the text under a heading, up to the next one of its level."""
    text = PAGES[page].read_text(encoding="utf-8")
    level = re.escape(heading.split(" ")[0])
    return text.partition(f"\n{heading}\n")[2].split(f"\n{heading.split(' ')[0]} ")[0] if level else ""


def test_readme_is_short() -> None:
    assert len(README.encode()) <= 9000


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_out_of_the_site_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page].read_text(encoding="utf-8")):
        assert (ROOT / unquote(target)).exists(), target


def test_every_public_name_is_in_the_reference() -> None:
    for package in (dissect, unlearning):
        page = PAGES[f"docs/api/{package.__name__}.md"].read_text(encoding="utf-8")
        missing = [name for name in package.__all__ if f"::: {package.__name__}.{name}\n" not in page]
        assert missing == []


def test_everything_in_the_reference_exists() -> None:
    for page in (name for name in PAGES if name.startswith("docs/api/")):
        for name in re.findall(r"^::: ([\w.]+)$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            assert (
                importlib.util.find_spec(name)
                if page.endswith("_modules.md")
                else hasattr(importlib.import_module(module), attribute)
            ), name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = [name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")]
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(re.findall(r": ([\w/]+\.md)$", navigation, re.MULTILINE)) == sorted(pages + notebooks)


def test_every_method_has_a_section_with_its_options() -> None:
    from unlearning.methods.catalogue import list_methods

    for method in list_methods()["methods"]:
        text = section("docs/unlearning.md", f"### {method['name']}")
        assert "**Needs**" in text and "**Use it**" in text, method["name"]
        assert [name for name in (o["name"] for o in method["options"]) if f"`{name}" not in text] == []


def test_every_importable_room_is_on_the_architecture_page() -> None:
    text = PAGES["docs/architecture.md"].read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "figures" / "architecture.svg").read_text(encoding="utf-8")
    for package in (dissect, unlearning):
        for path in Path(package.__path__[0]).iterdir():
            if (path / "__init__.py").is_file() or path.stem in ("options", "plotting"):
                assert f"`{path.stem}`" in text and f">{path.stem}<" in picture, path.stem


COLUMNS = {
    "patch": {"results": "patch and restore: results.parquet"},
    "decompose": {"results": "decompose: results.parquet", "positions": "decompose: positions.parquet"},
    "probe": {
        "results": "probe: results.parquet",
        "layers": "probe: layers.parquet",
        "neurons": "probe: neurons.parquet",
    },
    "behave": {"results": "behave: results.parquet", "coefficients": "behave: coefficients.parquet"},
}


@pytest.mark.parametrize("command", COLUMNS)
def test_every_column_is_explained(command: str, tmp_path: Path) -> None:
    from dissect.cli import main

    windows = ["--layers", "2"] if command == "patch" else []
    made = call_main(
        main,
        *(command, "--base", "demo:base", "--unlearned", "demo:npo", "--limit", "4", *windows),
        *("--quiet", "--out", tmp_path / command),
    )
    assert made.code == 0, made.err
    page = PAGES["docs/own_checkpoints.md"].read_text(encoding="utf-8")
    shared = section("docs/own_checkpoints.md", f"### {COLUMNS['patch']['results']}")
    for table, heading in COLUMNS[command].items():
        assert f"### {heading}\n" in page
        own = section("docs/own_checkpoints.md", f"### {heading}")
        layers = section("docs/own_checkpoints.md", f"### {COLUMNS['probe']['layers']}")
        known = set(re.findall(r"`(\w+)`", own + shared + layers))
        assert set(pd.read_parquet(tmp_path / command / f"{table}.parquet").columns) - known == set()


def test_every_column_of_a_verdict_is_explained() -> None:
    from dissect.stress.core.result import COLUMNS as OF_A_TEST
    from dissect.verdicts.facts import COLUMNS as OF_A_FACT

    known = set(re.findall(r"`(\w+)`", section("docs/own_checkpoints.md", "### verdict")))
    assert {"test", "level", *OF_A_TEST} - known == set()
    assert set(OF_A_FACT) - known == set()
