"""End tokens in files of strangers; what is none is refused by the file's name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dissect.models.model import load_model
from tests.unlearning.checkpoints.adapters import refused, save_base, train_adapter
from tests.unlearning.helpers import build_tiny_llama
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.token_ids import end_tokens
from unlearning.common.errors import InputError
from unlearning.evaluation.generation import answer_ends

WRONG = [[[1]], [1, [2]], "1", "</s>", ["</s>"], 1.0, [1.5], True, [1, False], -1, [1, -2], {}, {"a": 1}, [None]]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_token_that_is_none_is_refused_by_file(
    value: Any, file: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = save_base(tmp_path / "model")
    tokenizer.save_pretrained(path)
    content = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(content | {"eos_token_id": value}))
    message = refused(path)
    assert message.startswith(f"{path / file}: eos_token_id must be the number of a token or a list of numbers, got ")
    for stream in (False, True):
        with pytest.raises(InputError) as error:
            load_model(path, device="cpu", stream=stream)
        assert str(error.value) == message


@pytest.mark.parametrize("content", ["[]", "null", "5", "{", '"x"', "", "[" * 100_000, "\udcff"])
def test_a_generation_config_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "model")
    train_adapter(tmp_path / "adapter", base)
    (base / "generation_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    for path in (base, tmp_path / "adapter"):
        assert refused(path) == f"{base / 'generation_config.json'}: broken; copy it again"


@pytest.mark.parametrize(("value", "tokens"), [(5, {5}), ([5, 7], {5, 7}), (None, set()), ([], set()), (0, {0})])
def test_end_tokens_count(
    value: Any, tokens: set[int], tmp_path: Path, tokenizer: PreTrainedTokenizerFast, recwarn: pytest.WarningsRecorder
) -> None:
    path = save_base(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    recwarn.clear()
    model = load_weights(path)
    assert answer_ends(model, tokenizer).tokens == tokens | {tokenizer.eos_token_id}
    assert not recwarn.list


@pytest.mark.parametrize("value", [384, [1, 100_000]])
def test_an_end_token_beyond_the_vocabulary_is_said(value: Any, tmp_path: Path) -> None:
    path = save_base(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.warns(UserWarning, match=r"_config.json: eos_token_id (384|100000) is not among the 384 tokens"):
        load_weights(path)


@pytest.mark.parametrize("value", [[[1]], "1", -1])
def test_a_model_in_memory_is_named(value: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    model.generation_config.eos_token_id = value
    with pytest.raises(InputError, match="the generation config of LlamaForCausalLM: eos_token_id must be the number"):
        answer_ends(model, tokenizer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=JSON)
def test_any_value_is_tokens_or_one_line(value: Any) -> None:
    try:
        tokens = end_tokens(value, "file")
    except InputError as error:
        assert str(error).startswith("file: ") and "\n" not in str(error) and len(str(error)) < 300
    else:
        assert all(type(token) is int and token >= 0 for token in tokens)
