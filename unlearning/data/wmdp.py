"""The corpora of WMDP (2403.03218), and the general text that its recipe retains, as documents.

Locally: `wmdp/bio-forget-corpus.jsonl` and so on, as the authors hand them out, or copies of the hub's data sets.
"""

import json
from dataclasses import replace
from pathlib import Path

from unlearning.common.errors import InputError, nearest
from unlearning.data.hub import Part
from unlearning.data.named import Found, read_part
from unlearning.data.records import Record

_CORPORA = "cais/wmdp-corpora"
_DIRECTORIES = ("wmdp", "wmdp-corpora", "WMDP")

PARTS = {
    **{
        name: Part(f"wmdp:{name}", _CORPORA, f"{name}-corpus", "train")
        for name in ("bio-retain", "cyber-forget", "cyber-retain")
    },
    "bio-forget": Part("wmdp:bio-forget", "cais/wmdp-bio-forget-corpus"),  # gated
    "wikitext": Part("wmdp:wikitext", "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}
"""The corpora's parts on the hub."""

WIKITEXT_CHARACTERS = 50
"""Characters that the recipe's retain texts exceed; shorter texts are headings and empty lines."""


def read(name: str, data_dir: Path | None) -> Found:
    """Read the documents of a corpus.

    A line of a corpus may hold JSON; the document is its `text`. Public code trains on the raw lines of corpora whose
    name it does not know, keys and braces included.

    Args:
        name: Name of the corpus, such as `bio-retain`.
        data_dir: Directory of data sets; the hub is asked for what it lacks.

    Returns:
        Records with `text`, and their source.

    Raises:
        InputError: The corpus does not exist, or is neither in the directory nor on the hub.
    """
    if name not in PARTS:
        raise InputError(f"wmdp:{name}: no such corpus{nearest(name, PARTS) or ';'} there are {', '.join(PARTS)}")
    remote = PARTS[name]
    local = replace(remote, config=remote.config or f"{name}-corpus", split=remote.split or "train")
    found = read_part(local, _DIRECTORIES, data_dir, remote=remote)
    documents = [_document(record, f"{found.source}, record {n}") for n, record in enumerate(found.records, start=1)]
    if name != "wikitext":
        return replace(found, records=documents)
    long = [document for document in documents if len(document["text"]) > WIKITEXT_CHARACTERS]
    n_short = len(documents) - len(long)
    note = f"wikitext: {n_short} texts of at most {WIKITEXT_CHARACTERS} characters are left out, as in the recipe"
    return replace(found, records=long, notes=(note,))


def _document(record: Record, where: str) -> Record:
    text = record.get("text")
    if not isinstance(text, str):
        raise InputError(f'{where}: a document should have its text under "text"; its keys are {", ".join(record)}')
    if not text.lstrip().startswith("{"):
        return {"text": text}
    try:
        inner = json.loads(text)
    except json.JSONDecodeError:
        return {"text": text}
    return _document(inner, where)
