"""Check a built site: no page loads anything from another host, and the search finds what it should.

python docs/hooks/check_site.py site
"""

import json
import re
import sys
from pathlib import Path

ASSET = re.compile(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)", re.IGNORECASE)
STYLE = re.compile(r"<link\b(?![^>]*rel=[\"']?canonical)[^>]*?\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)", re.IGNORECASE)
IMPORT = re.compile(r"url\(\s*[\"']?((?:https?:)?//[^\"')]+)", re.IGNORECASE)


def foreign_assets(site: Path) -> list[str]:
    """Return every address outside of the site that a page or a style sheet loads, with its file."""
    found = []
    for path in sorted(site.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(site)}: {url}" for pattern in (ASSET, STYLE) for url in pattern.findall(text)]
    for path in sorted(site.rglob("*.css")):
        found += [f"{path.relative_to(site)}: {url}" for url in IMPORT.findall(path.read_text(encoding="utf-8"))]
    return found


def pages_about(site: Path, word: str) -> list[str]:
    """Return the places in the search index whose title or text has the word."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    return [doc["location"] for doc in index["docs"] if word in f"{doc['title']} {doc['text']}".lower()]


def main(site: Path) -> int:
    """Tell what is wrong with a site; return 1 where something is."""
    problems = [f"loads from outside: {found}" for found in foreign_assets(site)]
    if not any(place.startswith("glossary") for place in pages_about(site, "control")):
        problems.append("the search does not find 'control' in the glossary")
    sys.stderr.write("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
