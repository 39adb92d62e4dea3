"""Labels on disk, for a run that resumes and for a person to read.

    DIR/labels.parquet   one row per token
    DIR/labels.json      options, counts, the anchor dictionary

Row t of a block describes the prediction made at position t, behind `token`: `next` is the original text's next token,
`label` the generic label that is trained, `masked` the reason why there is no label, `anchor` the anchor that `next`
belongs to.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.methods.whp.labels import IGNORED, LabelCounts, LabelledBlock, LabelOptions, Labels

TABLE = "labels.parquet"
RECORD = "labels.json"
COLUMNS = ("block", "position", "token_id", "token", "next_id", "next", "label_id", "label", "masked", "anchor")


def labels_frame(labels: Labels, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Return the table of the labels.

    Args:
        labels: The labels.
        tokenizer: Tokenizer of the text.

    Returns:
        One row per token; `label_id` is null without a label, `next_id` at the end of a block.
    """
    texts = _TokenTexts(tokenizer)
    rows = []
    for number, block in enumerate(labels.blocks):
        following = [*((token, texts[token]) for token in block.input_ids[1:]), (None, "")]
        for position, token in enumerate(block.input_ids):
            target = block.targets[position]
            label = (None, "") if target == IGNORED else (target, texts[target])
            rows.append(
                (number, position, token, texts[token], *following[position], *label)
                + (block.reasons[position], block.anchors[position])
            )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"next_id": "Int64", "label_id": "Int64"})


def save_labels(directory: str | Path, labels: Labels, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write both files, each whole and the record last: if the record exists, both files do.

    Args:
        directory: An existing directory.
        labels: The labels.
        tokenizer: Tokenizer of the text.

    Raises:
        InputError: The disk is full, or the directory cannot be written to.
    """
    directory = Path(directory)
    record = {
        "options": asdict(labels.options),
        "counts": asdict(labels.counts),
        "anchors": labels.generics,
    }
    frame = labels_frame(labels, tokenizer)
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    (directory / RECORD).unlink(missing_ok=True)  # an older record must not describe the new table
    _write_whole(directory / TABLE, lambda part: frame.to_parquet(part, index=False))
    _write_whole(directory / RECORD, lambda part: part.write_text(text, encoding="utf-8"))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror or error}; free some space or choose another directory"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def read_labels(directory: str | Path) -> tuple[Labels, pd.DataFrame]:
    """Read the labels that `save_labels` wrote.

    Args:
        directory: Directory of the run.

    Returns:
        The labels and their table.

    Raises:
        InputError: A file is missing, broken or incomplete.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; name the directory of a whp run")
    for name in (TABLE, RECORD):
        if not (directory / name).is_file():
            raise InputError(f"{directory}: has no {name}; only runs of the method whp have labels")
    record = _read_record(directory / RECORD)
    frame = _read_table(directory / TABLE)
    try:
        options, counts = LabelOptions(**record["options"]), LabelCounts(**record["counts"])
        generics = dict(record["anchors"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / RECORD}: is not a record of labels ({error}); make the labels again") from None
    blocks = [_block(group) for _, group in frame.groupby("block", sort=True)]
    if len(blocks) != counts.blocks or len(frame) != counts.tokens:
        raise InputError(
            f"{directory / TABLE}: holds {len(frame)} tokens in {len(blocks)} blocks, and {RECORD} says "
            f"{counts.tokens} in {counts.blocks}; make the labels again"
        )
    return Labels(blocks, counts, options, generics), frame


def _block(group: pd.DataFrame) -> LabelledBlock:
    return LabelledBlock(
        input_ids=tuple(group["token_id"].tolist()),
        targets=tuple(group["label_id"].fillna(IGNORED).astype(int).tolist()),
        reasons=tuple(group["masked"].tolist()),
        anchors=tuple(group["anchor"].tolist()),
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); make the labels again") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: is not a record of labels; make the labels again")
    return record


def _read_table(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]}); make the labels again") from None
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise InputError(f"{path}: has no column {missing[0]!r}; make the labels again")
    return frame


class _TokenTexts(dict[int, str]):
    """The text of each token inside a longer text, with its white space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Create an empty cache."""
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        """Decode a token. Decoded alone, a token of the SentencePiece kind would lose the white space before it."""
        once, twice = (
            str(self.tokenizer.decode([token] * times, clean_up_tokenization_spaces=False)) for times in (1, 2)
        )
        self[token] = twice[len(once) :]
        return self[token]
