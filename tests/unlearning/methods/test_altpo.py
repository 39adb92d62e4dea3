"""AltPO's alternates: drawn from the reference model, kept, and refused where there are none."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.methods.helpers import DATA, losses_of
from unlearning import Example, InputError
from unlearning.evaluation.generation import sampled_answers
from unlearning.methods.altpo import ALTPO, ROUNDS, AltPOOptions, draw_alternates
from unlearning.methods.dpo import DPO, DPOOptions
from unlearning.methods.stages import PreparationInputs
from unlearning.options import TrainOptions

OPTIONS = AltPOOptions(samples=3, max_new_tokens=6)


def never_called(*_arguments: object, **_options: object) -> PreTrainedModel:
    raise AssertionError("AltPO trains no other model")


@pytest.fixture
def start(tokenizer: PreTrainedTokenizerFast) -> PreparationInputs:
    return PreparationInputs(
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        forget=build_examples(3),
        alternates=None,
        max_length=None,
        batch_size=4,
        training=TrainOptions(),
        seed=5,
        output_dir=None,
        progress=False,
        train=never_called,
    )


@torch.no_grad()
def build_bigrams(after: dict[int | None, dict[int, float]]) -> LlamaForCausalLM:
    """A model whose next token depends on the last one alone: its probabilities after each; None is any other token."""
    model = build_tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    embedding.zero_()
    embedding[:, 0] = 1
    head.fill_(-20)
    for place, (last, following) in enumerate(after.items()):
        if last is not None:
            embedding[last] = 0
            embedding[last, place] = 1
        assert place == 0 or last is not None  # None comes first
        for token, p in following.items():
            head[token, place] = math.log(p) / math.sqrt(32)  # the final norm scales a unit vector up to sqrt(width)
    return model


def sure_of(token: int) -> LlamaForCausalLM:
    """A model that answers with one token, and then ends."""
    return build_bigrams({None: {token: 1.0}, token: {0: 1.0}})


@torch.no_grad()
def test_altpo_is_dpo() -> None:
    assert ALTPO.needs(AltPOOptions(retain_loss="kl")) == DPO.needs(DPOOptions(retain_loss="kl"))
    ours = losses_of(ALTPO, AltPOOptions(beta=0.3), DATA)
    theirs = losses_of(DPO, DPOOptions(beta=0.3), DATA)
    assert ours == theirs


def test_alternates_are_the_reference_models_samples(start: PreparationInputs) -> None:
    prepared = draw_alternates(start, OPTIONS)
    prompts = [example.prompt for example in start.forget]
    expected = sampled_answers(start.model, start.tokenizer, prompts, samples=3, seed=5, max_new_tokens=6)
    assert prepared.alternates == expected
    assert prepared.notes == {"alternates": {"drawn": 9, "dropped_empty": 0, "dropped_equal_to_the_answer": 0}}


def test_empty_samples_are_dropped_and_counted(start: PreparationInputs) -> None:
    (word,) = start.tokenizer("A")["input_ids"]
    often_silent = replace(start, model=build_bigrams({None: {0: 0.5, word: 0.5}, word: {0: 1.0}}))
    options = replace(OPTIONS, samples=20)
    prepared = draw_alternates(often_silent, options)
    assert prepared.alternates is not None and prepared.notes is not None
    assert {text for row in prepared.alternates for text in row} == {"A"}
    n_kept = sum(map(len, prepared.alternates))
    assert 15 < n_kept < 45
    assert prepared.notes["alternates"] == {"drawn": 60, "dropped_empty": 60 - n_kept, "dropped_equal_to_the_answer": 0}


@pytest.mark.parametrize("question", ["Question:", "Q:"])
def test_samples_end_where_another_question_begins(start: PreparationInputs, question: str) -> None:
    tokens = [token for text in ("A", *question) for token in start.tokenizer(text)["input_ids"]]
    ring = {last: {following: 1.0} for last, following in zip(tokens, [*tokens[1:], tokens[0]], strict=True)}
    rambling = replace(start, model=build_bigrams({None: {tokens[0]: 1.0}, **ring}))
    (whole,) = sampled_answers(rambling.model, start.tokenizer, ["x"], max_new_tokens=20)
    assert whole[0].startswith(f"A{question}A{question}"[:20])
    assert draw_alternates(rambling, replace(OPTIONS, max_new_tokens=20)).alternates == [["A"] * 3] * 3


def test_given_alternates_are_used_as_they_are(start: PreparationInputs) -> None:
    prepared = draw_alternates(replace(start, alternates=[["x"], ["y"], ["z"]]), OPTIONS)
    assert prepared.alternates is None and prepared.notes is None


def test_what_equals_the_answer_or_says_nothing_is_dropped_and_counted(start: PreparationInputs) -> None:
    prompts = [example.prompt for example in start.forget]
    rows = sampled_answers(start.model, start.tokenizer, prompts, samples=3, seed=5, max_new_tokens=6)
    # The first prompt's own answer is its second sample, with other white space.
    forget = [replace(start.forget[0], answer=f"  {rows[0][1]}\n"), *start.forget[1:]]
    prepared = draw_alternates(replace(start, forget=forget), OPTIONS)
    assert prepared.alternates == [[rows[0][0], rows[0][2]], rows[1], rows[2]]
    assert prepared.notes == {"alternates": {"drawn": 9, "dropped_empty": 0, "dropped_equal_to_the_answer": 1}}


def test_a_prompt_without_any_is_drawn_for_again(start: PreparationInputs) -> None:
    (row,) = sampled_answers(start.model, start.tokenizer, ["Who was"], samples=1, seed=5, max_new_tokens=6)
    prepared = draw_alternates(replace(start, forget=[Example("Who was", row[0])]), replace(OPTIONS, samples=1))
    (again,) = sampled_answers(start.model, start.tokenizer, ["Who was"], samples=1, seed=6, max_new_tokens=6)
    assert prepared.alternates == [again]
    assert prepared.notes == {"alternates": {"drawn": 2, "dropped_empty": 0, "dropped_equal_to_the_answer": 1}}


def test_a_model_that_says_only_the_answer_is_refused(start: PreparationInputs) -> None:
    token = start.tokenizer(" Oslo")["input_ids"][0]
    answer = start.tokenizer.decode([token]).strip()
    sure = replace(start, model=sure_of(token), forget=[Example("Where?", answer), Example("Who?", "another")])
    prepared = draw_alternates(replace(sure, forget=sure.forget[1:]), OPTIONS)
    assert prepared.alternates == [[answer] * 3]
    message = f"1 of 2 forget prompts have no alternate after {ROUNDS} rounds of 3 .*'Where.'.*`temperature`"
    with pytest.raises(InputError, match=message):
        draw_alternates(sure, OPTIONS)


def test_the_template_wraps_what_is_continued(start: PreparationInputs) -> None:
    options = replace(OPTIONS, alternate_template="{prompt} Not {answer}, but")
    prompts = [f"{example.prompt} Not {example.answer}, but" for example in start.forget]
    expected = sampled_answers(start.model, start.tokenizer, prompts, samples=3, seed=5, max_new_tokens=6)
    assert draw_alternates(start, options).alternates == expected
    with pytest.raises(InputError, match="`alternate_template` must contain {prompt}, got 'Why'"):
        draw_alternates(start, replace(OPTIONS, alternate_template="Why"))


def test_alternates_are_kept_with_the_run_and_read_when_it_goes_on(start: PreparationInputs, tmp_path: Path) -> None:
    first = draw_alternates(replace(start, output_dir=tmp_path), OPTIONS)
    (kept,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["answer"]) for row in rows] == [(e.prompt, e.answer) for e in start.forget]
    assert [row["alternates"] for row in rows] == first.alternates
    resumed = draw_alternates(replace(start, output_dir=tmp_path, model=sure_of(7)), OPTIONS)
    assert resumed.alternates == first.alternates
