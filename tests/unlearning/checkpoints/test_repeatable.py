"""Tokenizers that split at random give the same tokens here, or are refused."""

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dissect.models.model import Model, load_model
from tests.unlearning.checkpoints.adapters import save_base
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.load import load_tokenizer
from unlearning.checkpoints.repeatable import check_repeatable, without_sampling
from unlearning.common.errors import InputError

TEXT = "Where was Ada Brook born? In a town by the river, and nobody remembers which one it was. " * 3


def with_dropout(path: Path, dropout: float) -> Path:
    record = json.loads((path / "tokenizer.json").read_text())
    record["model"]["dropout"] = dropout
    (path / "tokenizer.json").write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("dropout", [0.001, 0.5])
def test_dropout_is_switched_off_with_a_word(
    dropout: float, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = save_base(tmp_path / "model")
    tokenizer.save_pretrained(path)
    with_dropout(path, dropout)
    with pytest.warns(UserWarning, match=r"its tokenizer splits texts at random \(dropout\), which is switched off"):
        loaded = load_tokenizer(path)
    assert all(loaded(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"] for _ in range(20))
    with pytest.warns(UserWarning, match="switched off"):
        model = load_model(path, device="cpu")
    assert model.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_a_tokenizer_in_memory_that_splits_at_random_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    shaken = copy.deepcopy(tokenizer)
    shaken.backend_tokenizer.model.dropout = 0.5
    assert len({tuple(shaken(TEXT)["input_ids"]) for _ in range(20)}) > 1
    with pytest.raises(InputError, match="mine: its tokenizer splits the same text at random"):
        Model.wrap(build_tiny_llama(), shaken, name="mine")


def test_sampling_of_unigrams_is_switched_off() -> None:
    pieces = [("<unk>", 0.0), *((letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyzAESTW ?:.,"), ("no", -6.0)]
    shaken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, unk_id=0)))
    shaken.backend_tokenizer.model.alpha, shaken.backend_tokenizer.model.nbest_size = 0.1, 64
    assert len({tuple(shaken("nonono" * 9)["input_ids"]) for _ in range(20)}) > 1
    with pytest.warns(UserWarning, match="switched off"):
        quiet = without_sampling(shaken, name="unigrams")
    assert len({tuple(quiet("nonono" * 9)["input_ids"]) for _ in range(20)}) == 1


def test_sampling_that_nothing_names_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    class Shaken(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(text[: random.randrange(1, len(text))], **options)

    shaken = Shaken(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="at random"):
        check_repeatable(shaken, name="shaken")


def test_other_tokenizers_are_read_without_a_word(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    with_dropout(tmp_path, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
