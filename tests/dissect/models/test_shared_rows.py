"""Pairs whose embeddings have different numbers of rows, and tokenizers that differ in little."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dissect import load_pair
from dissect.models.model import load_model
from dissect.models.pair import resolve_control
from tests.dissect.helpers import build_model, build_tokenizer
from unlearning.common.errors import InputError

IDS = torch.arange(1, 9)[None]


def saved(
    path: Path, *, rows: int | None = None, tied: bool = True, seed: int = 0, tokens: tuple[str, ...] = ()
) -> Path:
    """Save a tiny Llama, its embeddings resized with random new rows, and its tokenizer with further tokens."""
    model = build_model("llama", seed=seed, tied=tied)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("larger", ["base", "unlearned"])
@pytest.mark.parametrize("tokens", [(), ("<new>",)], ids=["padded", "new token"])
@pytest.mark.filterwarnings("ignore:the tokenizers of")
def test_only_shared_rows_are_compared(larger: str, tied: bool, tokens: tuple[str, ...], tmp_path: Path) -> None:
    paths = {
        role: saved(
            tmp_path / role,
            tied=tied,
            seed=seed,
            rows=448 if role == larger else None,
            tokens=tokens if role == larger else (),
        )
        for seed, role in enumerate(("base", "unlearned"))
    }
    with pytest.warns(UserWarning, match=rf"{larger} has 448 embeddings and .* 384; only the 384 that both have"):
        pair = load_pair(paths["base"], paths["unlearned"], device="cpu")
    for role, model in (("base", pair.base), ("unlearned", pair.unlearned)):
        plain = AutoModelForCausalLM.from_pretrained(paths[role], dtype=torch.float32).eval()
        with torch.no_grad():
            torch.testing.assert_close(model.hf(IDS).logits, plain(IDS).logits[..., :384], atol=1e-5, rtol=1e-5)
        assert model.hf.config.vocab_size == 384 and model.missing_sites == {}
        assert (model.hf.get_input_embeddings().weight is model.hf.get_output_embeddings().weight) == tied


def test_a_padded_control_is_cut_too(tmp_path: Path) -> None:
    base, unlearned = saved(tmp_path / "base"), saved(tmp_path / "unlearned", seed=1)
    pair = load_pair(base, unlearned, device="cpu")
    control = load_model(saved(tmp_path / "control", seed=2, rows=400), device="cpu")
    with pytest.warns(UserWarning, match="control has 400 embeddings"):
        cut = resolve_control(pair, control)
    assert cut is not None and cut.hf.config.vocab_size == 384


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    base, other = saved(tmp_path / "base", tokens=("<one>",)), saved(tmp_path / "other", rows=400, tokens=("<two>",))
    with pytest.raises(InputError, match="differ in vocabulary: 384 and 400 embeddings, and token"):
        load_pair(base, other, device="cpu")


def test_a_special_token_beyond_the_shared_rows_is_refused(tmp_path: Path) -> None:
    base, unlearned = saved(tmp_path / "base", rows=400), saved(tmp_path / "unlearned", seed=1)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(384 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == 384
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match="uses the token '<pad>', and only 384"):
        load_pair(base, unlearned, device="cpu")


def test_streamed_models_must_have_the_same_rows(tmp_path: Path) -> None:
    base, unlearned = saved(tmp_path / "base"), saved(tmp_path / "unlearned", seed=1, rows=400)
    with pytest.raises(InputError, match="differ in vocabulary: 384 and 400"):
        load_pair(base, unlearned, device="cpu", stream=True)


def test_chat_templates_that_differ_are_said(tmp_path: Path) -> None:
    base, unlearned = saved(tmp_path / "base"), saved(tmp_path / "unlearned", seed=1)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(unlearned)
    with pytest.warns(UserWarning, match="differ in .*the chat template; .*base's is used for both"):
        load_pair(base, unlearned, device="cpu")
