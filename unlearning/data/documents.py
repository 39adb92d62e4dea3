"""Plain text: whole documents, and the pieces that they are cut into."""

import json
import re
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.common.places import is_directory
from unlearning.data.records import Record, fault_of_text, read_json, read_text
from unlearning.data.spans import AnswerSpan, encode_answer

# ConceptVectors' split: white space after a full stop or question mark that does not end an abbreviation.
_SENTENCE_END = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s")


def read_text_documents(path: Path) -> list[Record]:
    """Read a text file as one document, or each .txt file under a directory as one.

    Args:
        path: File or directory.

    Returns:
        Records with `text`, in the order of the files' names.

    Raises:
        InputError: A file is empty, not UTF-8, or holds JSON lines, which would be trained on as text; or the directory
            holds no .txt file.
    """
    if not is_directory(path):
        return [{"text": _whole_text(path)}]
    files = sorted(path.rglob("*.txt"))
    if not files:
        found = sorted(file.name for file in path.iterdir()) or ["nothing"]
        some = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
        raise InputError(f"{path}: a directory without .txt files; name a file in it (it holds {some})")
    return [{"text": _whole_text(file)} for file in files]


def _whole_text(path: Path) -> str:
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it should hold text")
    if fault := fault_of_text(text):
        raise InputError(f"{path}: {fault}")
    if _is_records(text) or _is_records(text.strip().split("\n", 1)[0]):
        raise InputError(f"{path}: holds JSON and would be read as plain text; rename it to .json or .jsonl")
    return text


def _is_records(text: str) -> bool:
    """Return whether a text is a JSON object or a list of them."""
    if text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        value = read_json(text)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def pack_sentences(text: str, *, longer_than: int = 400, separator: str = " ") -> list[str]:
    """Cut a text into paragraphs of whole sentences, each closed by the sentence that makes it longer than a limit.

    ConceptVectors' packing (2406.11614): sentences are found by a regular expression and appended until the paragraph
    is longer than 400 characters; the remainder at the end is a paragraph too.

    Args:
        text: The document.
        longer_than: The limit in characters.
        separator: Text between sentences. The published code has none, so that sentences stick together.

    Returns:
        The paragraphs, none of them empty.
    """
    paragraphs, sentences = [], []
    for sentence in _SENTENCE_END.split(text):
        sentences.append(sentence)
        paragraph = separator.join(sentences)
        if len(paragraph) > longer_than:
            paragraphs.append(paragraph.strip())
            sentences = []
    paragraphs.append(separator.join(sentences).strip())
    return [paragraph for paragraph in paragraphs if paragraph]


def cut_document(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, *, append_eos: bool = False
) -> list[AnswerSpan]:
    """Cut a document into texts of at most `max_length` tokens; no token is lost or repeated.

    The tokens that the tokenizer puts in front of a text (such as a beginning-of-sequence token) begin each piece and
    count towards its length; the pieces' other tokens, one after another, are the document's. All pieces but the last
    are full, except that the last but one gives up a token if otherwise a single token would be left over.

    Args:
        tokenizer: The model's tokenizer.
        text: The document.
        max_length: Maximum number of tokens of a piece.
        append_eos: End the document, thus its last piece, with the end-of-sequence token.

    Returns:
        The pieces; none if the document is a single token, which nothing predicts.

    Raises:
        InputError: The text is empty, or `max_length` leaves no room for three tokens.
    """
    whole = encode_answer(tokenizer, "", text, append_eos=append_eos)
    prefix, tokens = whole.input_ids[: whole.answer_start], whole.input_ids[whole.answer_start :]
    if len(prefix) + len(tokens) < 2:
        return []
    if len(whole.input_ids) <= max_length:
        return [whole]
    room = max_length - len(prefix)
    if room < 3:
        raise InputError(f"`max_length` must be at least {len(prefix) + 3} to cut documents, got {max_length}")
    starts = list(range(0, len(tokens), room))
    if len(tokens) - starts[-1] == 1:
        starts[-1] -= 1
    pieces = [tokens[start:end] for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    spans = [AnswerSpan(input_ids=[*prefix, *piece], answer_start=len(prefix)) for piece in pieces]
    return [*spans[:-1], replace(spans[-1], n_closing=whole.n_closing)]
