"""Tokenizers that treat texts otherwise than the base's are said, part by part."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dissect.models.model import Model
from dissect.models.pair import load_like, load_pair, resolve_control
from dissect.models.tokenizers import differences
from tests.dissect.helpers import save_model

Record = dict[str, Any]


def lowercase(record: Record) -> None:
    record["normalizer"] = {"type": "Lowercase"}


def fewer_merges(record: Record) -> None:
    record["model"]["merges"] = record["model"]["merges"][:-5]


def prefix_space(record: Record) -> None:
    record["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def closing_token(record: Record) -> None:
    token = next(iter(record["added_tokens"]))
    special = {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token["content"], "type_id": 0}}]
    record["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token["content"]: special},
    }


def no_decoder(record: Record) -> None:
    record["decoder"] = None


def greedy_added_token(record: Record) -> None:
    record["added_tokens"][0]["lstrip"] = True


def truncation(record: Record) -> None:
    record["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


def padding(record: Record) -> None:
    strategy = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    record["padding"] = {**strategy, "pad_id": 0, "pad_type_id": 0, "pad_token": record["added_tokens"][0]["content"]}


CHANGES: list[tuple[Callable[[Record], None], str]] = [
    (lowercase, "normalizer"),
    (fewer_merges, "merges or unknown token"),
    (prefix_space, "pre-tokenizer"),
    (closing_token, "post-processor"),
    (no_decoder, "decoder"),
    (greedy_added_token, "way to find added tokens"),
]


def changed(path: Path, *changes: Callable[[Record], None]) -> Path:
    record = json.loads((path / "tokenizer.json").read_text())
    for change in changes:
        change(record)
    (path / "tokenizer.json").write_text(json.dumps(record))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tokenizers") / "base", "llama")


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    return tokenizer


@pytest.mark.parametrize(("change", "part"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_each_part_that_differs_is_said(
    change: Callable[[Record], None], part: str, base: Path, tmp_path: Path
) -> None:
    other = changed(shutil.copytree(base, tmp_path / "other"), change)
    assert differences(tokenizer_of(other), tokenizer_of(base)) == [part]
    with pytest.warns(UserWarning, match=f"the tokenizers of .* differ in the {part}; {base}'s is used for both"):
        pair = load_pair(base, other, device="cpu")
    assert pair.tokenizer is pair.base.tokenizer
    control = load_like(str(other), pair.base)
    with pytest.warns(UserWarning, match=f"differ in the {part}"):
        resolve_control(pair, Model(name="third", hf=control.hf, tokenizer=control.tokenizer, sha256="third"))


def test_all_parts_that_differ_are_said_in_one_line(base: Path, tmp_path: Path) -> None:
    other = changed(shutil.copytree(base, tmp_path / "other"), lowercase, fewer_merges)
    found = differences(tokenizer_of(other), tokenizer_of(base))
    assert found == ["normalizer", "merges or unknown token"]


def test_what_every_call_sets_anew_is_no_difference(base: Path, tmp_path: Path) -> None:
    """Truncation and padding of a tokenizer.json change no prompt; what was tokenised before does not matter either."""
    other = changed(shutil.copytree(base, tmp_path / "other"), truncation, padding)
    ours, theirs = tokenizer_of(base), tokenizer_of(other)
    text = "Who lives in the house by the river? Ada Brook does."
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert differences(tokenizer_of(other), ours) == differences(theirs, tokenizer_of(base)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pair(base, other, device="cpu")
