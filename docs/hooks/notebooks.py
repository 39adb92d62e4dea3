"""Add the notebooks to the documentation, each with the output of running it.

A notebook is run while the pages are built, and the result is kept in .docs_cache/ under a hash of the notebook and of
all code that it can reach: comments and docstrings do not count, so that only a change of the code runs it again.
Nothing that is run is committed. With DOCS_NOTEBOOKS=0 nothing is run: a page without a kept result has no output.
"""

import ast
import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from plotly.offline import get_plotlyjs

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".docs_cache"
PACKAGES = ("dissect", "unlearning")
PLOTLY = "javascripts/plotly.min.js"

_log = logging.getLogger("mkdocs.hooks.notebooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook, and plotly's script that draws their figures."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        content = page(nbformat.read(path, as_version=4), executed(path))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=content))
    files.append(File.generated(config, PLOTLY, content=get_plotlyjs()))
    return files


def executed(path: Path) -> Any:
    """Return a notebook with its output, from the cache where this very notebook and code were run before."""
    notebook = nbformat.read(path, as_version=4)
    kept = CACHE / f"{path.stem}-{_digest(notebook)}.ipynb"
    if kept.is_file():
        return nbformat.read(kept, as_version=4)
    if os.environ.get("DOCS_NOTEBOOKS") == "0":
        return notebook
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    _log.info("running %s", path.name)
    for cell in notebook.cells:
        # The renderer of the notebooks loads plotly from the net; here the figures are kept as data.
        cell.source = cell.source.replace('"notebook_connected"', '"plotly_mimetype"')
    try:
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    except CellExecutionError as error:
        raise PluginError(f"{path.name} does not run:\n{error}") from None
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{path.stem}-*.ipynb"):
        old.unlink()
    partial = kept.with_suffix(".partial")
    nbformat.write(notebook, partial)
    partial.replace(kept)
    return notebook


def page(source: Any, run: Any) -> str:
    """Return a notebook as a page: its text, its code as committed, and what the code printed and drew."""
    front = "---\nhide: [toc]\n---"  # figures and tables are wide
    return (
        "\n\n".join([front, *(part for cells in zip(source.cells, run.cells, strict=True) for part in _cell(*cells))])
        + "\n"
    )


def _cell(source: Any, run: Any) -> Iterator[str]:
    if source.cell_type == "markdown":
        yield _with_links(source.source)
        return
    yield f"```python\n{source.source}\n```"
    for output in run.get("outputs", []):
        shown = _output(output)
        if shown:
            yield shown


def _output(output: Any) -> str:
    if output.output_type == "stream":
        return _text(output.text) if output.name == "stdout" else ""
    if output.output_type == "error":
        return _text("\n".join([output.ename, output.evalue]))
    data = output.get("data", {})
    if "application/vnd.plotly.v1+json" in data:
        figure = {key: data["application/vnd.plotly.v1+json"][key] for key in ("data", "layout")}
        # "<" would end the script; JSON may spell it otherwise.
        text = json.dumps(figure).replace("<", "\\u003c")
        return f'<div class="plotly-figure" markdown="0"><script type="application/json">{text}</script></div>'
    if "text/markdown" in data:
        return data["text/markdown"].strip()
    if "text/html" in data:
        html = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
        html = re.sub(r"\n\s*", "\n", html).replace(' border="1" class="dataframe"', "").strip()
        return f'<div class="output-table" markdown="0">{html}</div>'
    return _text(data.get("text/plain", ""))


def _text(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
    return f"```text\n{text}\n```" if text else ""


def _with_links(markdown: str) -> str:
    """Return a text cell with links to the notebooks' pages, and to no file that the site does not have."""
    markdown = re.sub(r"\((\d\d_\w+)\.ipynb\)", r"(\1.md)", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!docs/)[^)]*\)", r"\1", markdown).replace("(../docs/", "(../")


def _digest(notebook: Any) -> str:
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(f"{cells}{_code()}".encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
    """Return a hash of all code of the packages, without docstrings, and of the data files beside it."""
    found = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix == ".py":
                found.update(ast.dump(_without_docstrings(ast.parse(path.read_bytes()))).encode())
            elif path.suffix in (".json", ".jsonl", ".txt", ".safetensors"):
                found.update(path.read_bytes())
    return found.hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return tree


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
