"""`unlearn cache`: list and clear what later runs may find again."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.common.errors import check_at_least
from unlearning.common.terminal import console, printable, write_json

if TYPE_CHECKING:
    from rich.table import Table

    from unlearning.common.cache import Entry

# \b keeps the line breaks of the following lines.
EXAMPLES = """\b
Examples:
  unlearn cache
  unlearn cache --older-than 30
  unlearn cache --clear --older-than 30
  unlearn cache --clear
"""


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is listed, except what is in use.")] = False,
    older_than: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Only what was not used for this number of days.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write machine-readable rows to stdout.")] = False,
) -> None:
    """List the cache: outputs of models before training, evaluations of controls, built-in models trained here.

    It lies in $UNLEARNING_CACHE, else in `unlearning` of the user's cache directory. All of it can be computed again.
    Before a run writes outputs of its model, the longest unused ones are removed until all take at most
    $UNLEARNING_CACHE_GB (20) GB; those that a process reads stay.
    """
    if older_than is not None:
        check_at_least("older_than", older_than, 0)

    from unlearning.common import cache as files

    found = files.list_cache()
    if older_than is not None:
        found = files.older_than(found, older_than)
    removed = [entry for entry in found if clear and entry.remove()]
    if as_json:
        rows = [{**_row(entry), "removed": entry in removed} for entry in found]
        write_json({"directory": str(files.cache_root()), "limit_bytes": files.cache_limit(), "entries": rows})
        return

    out = console()
    if found and not clear:
        out.print(_table(found))
    lines = [_total("removed" if clear else "in all", removed if clear else found, str(files.cache_root()))]
    kept = len(found) - len(removed)
    if clear and kept:
        lines.append(f"{kept} in use and kept")
    if not clear:
        limit = files.cache_limit() / 1e9
        lines.append(f"outputs of models are limited to {limit:g} GB together (environment variable {files.LIMIT})")
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _row(entry: "Entry") -> dict[str, object]:
    return {
        "kind": entry.kind,
        "what": entry.what,
        "model": entry.model,
        "data": entry.data,
        "bytes": entry.size,
        "last_used": datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds"),
        "in_use": entry.in_use,
        "path": str(entry.path),
    }


def _table(entries: "list[Entry]") -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("what", "model", "data", "size", "last used", box=box.SIMPLE_HEAD)
    table.columns[3].justify = "right"
    for number in (0, 3, 4):
        table.columns[number].no_wrap = True
    for entry in entries:
        used = "in use" if entry.in_use else datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        words = (Text(printable(text)) for text in (entry.what, entry.model, entry.data))
        table.add_row(*words, _size(entry.size), used)
    return table


def _total(word: str, entries: "list[Entry]", directory: str) -> str:
    if not entries:
        return f"nothing {'to remove ' if word == 'removed' else ''}in {directory}"
    count = f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
    return f"{word} {count}, {_size(sum(entry.size for entry in entries))}, in {directory}"


def _size(n_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"
