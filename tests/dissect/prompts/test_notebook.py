"""`--scoring notebook` against an independent re-implementation of the released notebooks (2410.06606).

The oracle below follows the notebooks step by step on the Hugging Face models: their prompt, one left-padded batch per
concept, pad = eos, no position ids, greedy 30 tokens, their answer-length rule, `logits[i, -n:]`, raw-logit MSE, ratio
per question, mean over a concept's questions, mean over concepts, windows clipped, every position patched. It uses
plain torch hooks and the tokenizer's own padding, and none of the toolkit's code.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dissect import load_prompts, patch
from dissect.models.model import Model
from dissect.models.pair import ModelPair
from tests.dissect.helpers import (
    PlainPatcher,
    assert_close,
    build_model,
    build_pair,
    build_tokenizer,
    change_weights,
    save_records,
)
from unlearning.common.errors import InputError

SITES = {"mlp_coef": ("mlp_coef",), "attn_out": ("attn_out",), "mlp_coef+attn_out": ("mlp_coef", "attn_out")}
CONCEPTS = {
    "Ada Brook": [" Where was Ada Brook born?\n", "Where was Ada?", " born in"],
    "Ben Hill": ["Question: Ben Hill born in Cairo?\n", " Was Ben Hill in Porto, Quito or Accra?"],
    "Cleo Stone": ["Cleo?", " Where was Cleo Stone born?", "in Lima", "Was Cleo Stone born in Kyoto?"],
}
"""Groups of different sizes and questions of different lengths: averaging order and left padding both matter."""


def notebook_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    theirs = copy.deepcopy(tokenizer)
    theirs.pad_token, theirs.padding_side = theirs.eos_token, "left"
    return theirs


def notebook_answers(
    vanilla: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[str]
) -> tuple[list[str], list[int]]:
    """QA_with_answers and answers_tokens_num of one concept."""
    prompts = ["Question: " + question + "\n Answer:" for question in questions]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    input_length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = vanilla.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=30
        )
    lengths = [len(row) - row.tolist().count(tokenizer.eos_token_id) - input_length for row in output]
    return tokenizer.batch_decode(output, skip_special_tokens=True), lengths


def notebook_loss(ours: Tensor, theirs: Tensor, lengths: list[int]) -> list[float]:
    return [torch.nn.functional.mse_loss(ours[i, -n:, :], theirs[i, -n:, :]).item() for i, n in enumerate(lengths)]


def notebook_krs(
    vanilla: PreTrainedModel,
    unlearned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    concepts: dict[str, tuple[list[str], list[int]]],
    *,
    half: int,
) -> dict[str, np.ndarray]:
    """KRS per site: array [layer, question], questions in the order of their concepts."""
    n_layers = vanilla.config.num_hidden_layers
    columns: dict[str, list[np.ndarray]] = {site: [] for site in SITES}
    for rows, lengths in concepts.values():
        inputs = tokenizer(rows, return_tensors="pt", padding=True)
        runs = PlainPatcher(
            vanilla, unlearned, {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        )
        original = runs.base_logits()
        before = notebook_loss(original, runs.logits(), lengths)
        for name, sites in SITES.items():
            krs = np.empty((n_layers, len(rows)))
            for centre in range(n_layers):
                layers = range(max(0, centre - half), min(n_layers - 1, centre + half) + 1)
                after = notebook_loss(original, runs.logits(sites, layers), lengths)
                krs[centre] = [1 - a / b for a, b in zip(after, before, strict=True)]
            columns[name].append(krs)
    return {name: np.concatenate(parts, axis=1) for name, parts in columns.items()}


def assert_same_numbers(
    pair: ModelPair, path: Path, concepts: dict[str, tuple[list[str], list[int]]], *, answers_from: Model | None
) -> None:
    tokenizer = notebook_tokenizer(pair.tokenizer)
    answers: Any = "given" if answers_from is None else "base"
    prompts = load_prompts(path, pair.tokenizer, scoring="notebook", answers=answers, answers_from=answers_from)
    assert [item.n_answer_tokens for item in prompts.items] == [n for _, ns in concepts.values() for n in ns]
    result = patch(pair, prompts, window=3, control=None, progress=False)
    expected = notebook_krs(pair.base.hf, pair.unlearned.hf, tokenizer, concepts, half=1)
    sizes = [len(rows) for rows, _ in concepts.values()]
    curve = result.curve().set_index(["site", "centre"])["krs"]
    for site, krs in expected.items():
        for centre, per_question in enumerate(krs):
            ours = result.frame[(result.frame["site"] == site) & (result.frame["centre"] == centre)]["krs"]
            assert_close(ours.to_numpy(), per_question, atol=1e-6)
            per_concept = [part.mean() for part in np.split(per_question, np.cumsum(sizes)[:-1])]
            assert_close(float(curve[site, centre]), float(np.mean(per_concept)), atol=1e-6)
            assert abs(per_question.mean() - np.mean(per_concept)) > 1e-5, "the averaging order must matter here"


def build_notebook_pair(family: str) -> ModelPair:
    """A pair whose base answers with tokens that the tokenizer knows and does not end an answer early."""
    tokenizer = build_tokenizer()
    base, unlearned = (build_model(family, n_layers=4, tied=False, context=256) for _ in range(2))
    for model in (base, unlearned):
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            head[[tokenizer.eos_token_id, *range(len(tokenizer), len(head))]] = 0.0
    change_weights(unlearned, lambda name: "head" not in name and "embed" not in name)
    return ModelPair(
        base=Model.wrap(base, tokenizer, name="base"), unlearned=Model.wrap(unlearned, tokenizer, name="unlearned")
    )


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_generated_answers_and_their_lengths_are_the_notebooks(family: str, tmp_path: Path) -> None:
    pair = build_notebook_pair(family)
    tokenizer = notebook_tokenizer(pair.tokenizer)
    concepts = {name: notebook_answers(pair.base.hf, tokenizer, questions) for name, questions in CONCEPTS.items()}
    lengths = [n for _, ns in concepts.values() for n in ns]
    assert min(lengths) < 30, "no left padding was taken off any answer"
    records = [{"question": question, "group": name} for name, questions in CONCEPTS.items() for question in questions]
    path = save_records(tmp_path / "questions.json", records)
    assert_same_numbers(pair, path, concepts, answers_from=pair.base)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])  # GPT-2's absolute positions show what padding shifts
def test_rows_and_lengths_of_a_conceptvectors_file_are_used_as_they_stand(family: str, tmp_path: Path) -> None:
    pair = build_pair(family, n_layers=4)
    concepts = {}
    records = []
    for number, (name, questions) in enumerate(CONCEPTS.items()):
        rows = [f"Question: {question}\n Answer: in Oslo and {question.strip()}" for question in questions]
        lengths = [5 + 2 * index + number for index in range(len(rows))]  # no rule gives these
        concepts[name] = (rows, lengths)
        records.append(
            {
                "id": 10 + number,
                "Concept": name,
                "QA": questions,
                "QA_with_answers": rows,
                "answers_tokens_num": lengths,
            }
        )
    path = save_records(tmp_path / "concepts.json", records)
    assert_same_numbers(pair, path, concepts, answers_from=None)


@pytest.mark.parametrize("filler", [0, 5])
def test_answers_that_end_early_shorten_the_notebooks_length(filler: int, tmp_path: Path) -> None:
    """generate() fills finished rows: with eos, and the rule takes it off; with another token, and it counts (B2)."""
    pair = build_notebook_pair("llama")
    tokenizer = notebook_tokenizer(pair.tokenizer)
    questions = CONCEPTS["Cleo Stone"]
    inputs = tokenizer([f"Question: {q}\n Answer:" for q in questions], return_tensors="pt", padding=True)
    with torch.no_grad():
        free = pair.base.hf.generate(**inputs, do_sample=False, max_new_tokens=30)[:, inputs["input_ids"].shape[1] :]
    # End a row at a token that no row says in its first steps, so that every answer keeps some length.
    (end, *_) = [token for row in free for token in row[14:29].tolist() if not (free[:, :14] == token).any()]
    config = pair.base.hf.generation_config
    config.eos_token_id, config.pad_token_id = [0, end], filler
    rows, lengths = notebook_answers(pair.base.hf, tokenizer, questions)
    pads = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    ended = [n < 30 - pad for n, pad in zip(lengths, pads, strict=True)]
    assert any(ended) == (filler == 0)
    path = save_records(tmp_path / "p.json", [{"question": question, "group": "Cleo"} for question in questions])
    with pytest.raises(InputError, match="prompt 0: no QA_with_answers .* set `answers` to base"):
        load_prompts(path, pair.tokenizer, scoring="notebook", answers_from=pair.base)
    prompts = load_prompts(path, pair.tokenizer, scoring="notebook", answers="base", answers_from=pair.base)
    assert [item.n_answer_tokens for item in prompts.items] == lengths
    assert [list(item.input_ids) for item in prompts.items] == [tokenizer(row)["input_ids"] for row in rows]


DATA = Path(os.environ.get("DISSECT_DATA", "")) / "conceptvectors"
REAL_FILES = sorted(DATA.glob("*.json")) if "DISSECT_DATA" in os.environ else []


@pytest.mark.skipif(not REAL_FILES, reason="the ConceptVectors file is not here: set DISSECT_DATA to its parent folder")
@pytest.mark.parametrize("scoring", ["answer", "notebook"])
def test_the_released_conceptvectors_file_runs(scoring: Any, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    context = 1024
    base, unlearned = (build_model("llama", n_layers=3, context=context) for _ in range(2))
    change_weights(unlearned)
    pair = ModelPair(
        base=Model.wrap(base, tokenizer, name="base"), unlearned=Model.wrap(unlearned, tokenizer, name="unlearned")
    )
    released = json.loads(REAL_FILES[0].read_text(encoding="utf-8"))
    assert len(released) == 10 and all(len(record["QA"]) == 10 for record in released)
    prompts = load_prompts(REAL_FILES[0], tokenizer, scoring=scoring, answers_from=pair.base, limit=20)
    assert len(prompts) == 20
    assert {item.group for item in prompts.items} == {record["Concept"] for record in released[:2]}
    for item, record, index in zip(prompts.items, np.repeat(released, 10), list(range(10)) * 2, strict=False):
        if scoring == "notebook":
            assert item.n_answer_tokens == record["answers_tokens_num"][index]
            assert list(item.input_ids) == tokenizer(record["QA_with_answers"][index])["input_ids"]
            assert item.scored.stop == len(item.input_ids)
        else:
            assert item.prompt == f"Question: {record['QA'][index]}\n Answer:"
            continuation = record["QA_with_answers"][index].removeprefix(item.prompt)
            assert item.answer and item.answer in continuation
            assert "\n" not in item.answer and "Question:" not in item.answer
    result = patch(pair, prompts, window=1, control=None, progress=False, out=tmp_path / "run")
    assert len(result.frame) == 20 * 3 * 3
    assert np.isfinite(result.frame["krs"]).all()
