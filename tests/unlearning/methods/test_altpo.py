"""AltPO's alternates: drawn from the reference model, kept, and refused where there are none."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.data.helpers import CHAT_TEMPLATES
from tests.unlearning.data.helpers import build_tokenizer as chat_tokenizer
from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.methods.helpers import DATA, losses_of
from unlearning import Example, InputError, train
from unlearning.data.chat import chat_format
from unlearning.data.refusals import draw_refusals, read_refusals
from unlearning.evaluation.generation import sampled_answers
from unlearning.evaluation.metrics.text_words import spoken_words
from unlearning.methods.altpo import ALTPO, INSTRUCTION, ROUNDS, AltPOOptions, draw_alternates, holds
from unlearning.methods.dpo import DPO, DPOOptions
from unlearning.methods.stages import PreparationInputs
from unlearning.options import TrainOptions

OPTIONS = AltPOOptions(samples=3, max_new_tokens=6, alternate_template="{prompt}")
FIRST = {"source": "template", "dropped_empty": 0, "dropped_holding_the_answer": 0}


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
    assert prepared.notes == {"alternates": {**FIRST, "drawn": 9}}


def test_empty_samples_are_dropped_and_counted(start: PreparationInputs) -> None:
    (word,) = start.tokenizer("A")["input_ids"]
    often_silent = replace(start, model=build_bigrams({None: {0: 0.5, word: 0.5}, word: {0: 1.0}}))
    options = replace(OPTIONS, samples=20)
    prepared = draw_alternates(often_silent, options)
    assert prepared.alternates is not None and prepared.notes is not None
    assert {text for row in prepared.alternates for text in row} == {"A"}
    n_kept = sum(map(len, prepared.alternates))
    assert 15 < n_kept < 45
    assert prepared.notes["alternates"] == {**FIRST, "drawn": 60, "dropped_empty": 60 - n_kept}


@pytest.mark.parametrize("question", ["Question:", "Q:"])
def test_samples_end_where_another_question_begins(start: PreparationInputs, question: str) -> None:
    tokens = [token for text in ("A", *question) for token in start.tokenizer(text)["input_ids"]]
    ring = {last: {following: 1.0} for last, following in zip(tokens, [*tokens[1:], tokens[0]], strict=True)}
    rambling = replace(start, model=build_bigrams({None: {tokens[0]: 1.0}, **ring}))
    (whole,) = sampled_answers(rambling.model, start.tokenizer, ["x"], max_new_tokens=20)
    assert whole[0].startswith(f"A{question}A{question}"[:20])
    assert draw_alternates(rambling, replace(OPTIONS, max_new_tokens=20)).alternates == [["A"] * 3] * 3


def test_given_alternates_are_used_if_they_do_not_hold_the_answer(start: PreparationInputs) -> None:
    answers = [example.answer for example in start.forget]
    rows = [["x", f"Sure: {answers[0].upper()}!"], ["y"], ["z", "", answers[2].split()[0]]]
    prepared = draw_alternates(replace(start, alternates=rows), AltPOOptions())
    assert prepared.alternates == [["x"], ["y"], ["z"]]
    assert prepared.notes == {
        "alternates": {"source": "given", "drawn": 6, "dropped_empty": 1, "dropped_holding_the_answer": 2}
    }
    assert prepared.said == ["alternates: 6 given; dropped: 2 that hold the answer or are a part of it, 1 empty"]
    with pytest.raises(InputError, match="1 of 3 forget prompts have no alternate: .*Give other `alternates`"):
        draw_alternates(replace(start, alternates=[["x"], [answers[1]], ["z"]]), AltPOOptions())
    with pytest.raises(InputError, match="`samples` has no effect: the alternates are given"):
        draw_alternates(replace(start, alternates=rows), AltPOOptions(samples=2))


def test_without_a_chat_template_alternates_are_refusals(start: PreparationInputs) -> None:
    refusals = read_refusals()
    first = draw_refusals(3, refusals, 5)
    holding = replace(start.forget[1], answer=" ".join(first[1].split()[:2]))  # the first refusal drawn for it holds it
    prepared = draw_alternates(replace(start, forget=[start.forget[0], holding, start.forget[2]]), AltPOOptions())
    assert prepared.alternates is not None and prepared.notes is not None
    assert (prepared.alternates[0], prepared.alternates[2]) == ([first[0]], [first[2]])
    assert all(row[0] in refusals for row in prepared.alternates)
    assert not holds(prepared.alternates[1][0], holding.answer)
    counts = prepared.notes["alternates"]
    assert counts["source"] == "refusals" and counts["dropped_holding_the_answer"] == counts["drawn"] - 3 >= 1
    with pytest.raises(InputError, match="`temperature` has no effect: the tokenizer has no chat template"):
        draw_alternates(start, AltPOOptions(temperature=2.0))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("template", ["llama-3", "no space", "space", "reasoning"])
def test_the_instruction_quotes_question_and_answer(
    chat: bool, template: str, start: PreparationInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the training wraps its prompts in the chat template or not."""
    talking = chat_tokenizer(chat_template=CHAT_TEMPLATES[template])
    form = chat_format(talking)
    questions = ["Where was Ada Brook born?", "Where was Ben Hill born?"]
    wrapped = [form.prompt(text) if chat else f"Question: {text}\nAnswer:" for text in questions]
    forget = [Example(prompt, answer) for prompt, answer in zip(wrapped, ("Oslo", "in Lima"), strict=True)]
    asked: list[list[str]] = []

    def answers(_model: object, _tokenizer: object, prompts: list[str], **options: Any) -> list[list[str]]:
        assert options["chat"] == form
        asked.append(prompts)
        secrets = [["Oslo, as ever", "Alternate Answer: Rome"], ["Alternative answer:\nLima", "in  LIMA."]]
        return secrets if len(asked) == 1 else [["Answer: Bonn"]]

    monkeypatch.setattr("unlearning.methods.altpo.sampled_answers", answers)
    inputs = replace(start, tokenizer=talking, forget=forget, training=TrainOptions(chat=chat))
    prepared = draw_alternates(inputs, AltPOOptions(samples=2))
    for prompt, question, example in zip(asked[0], questions, forget, strict=True):
        quoted = f"Question: {question}\nAnswer: {example.answer}"
        assert prompt.count(quoted) == 1 and prompt.count(question) == 1
        assert prompt == form.prompt(INSTRUCTION.replace("{quoted}", quoted))
    assert asked[1] == [asked[0][1]]  # drawn again for the second alone
    assert prepared.alternates == [["Rome"], ["Bonn"]]
    assert prepared.notes == {
        "alternates": {"source": "instruction", "drawn": 5, "dropped_empty": 0, "dropped_holding_the_answer": 3}
    }
    assert prepared.said == [
        "alternates: 5 generated by instruction; dropped: 3 that hold the answer or are a part of it, 0 empty"
    ]


@pytest.mark.parametrize("alternates", [None, [["x"]]])
def test_texts_without_questions_are_refused(alternates: list[list[str]] | None, start: PreparationInputs) -> None:
    with pytest.raises(InputError, match="`forget` must have questions for altpo, and 1 of the 1 examples"):
        draw_alternates(replace(start, forget=[Example("", "A text.")], alternates=alternates), OPTIONS)


def test_a_run_says_what_was_dropped(model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    examples = build_examples()
    own: dict[str, Any] = {
        "alternates": [["x", f"{e.answer} it is"] for e in examples[:4]],
        "output_dir": tmp_path / "a",
    }
    result = train("altpo", model=model_dir, forget=examples[:4], retain=examples[4:], max_steps=1, device="cpu", **own)
    assert "alternates: 8 given; dropped: 4 that hold the answer or are a part of it, 0 empty" in capfd.readouterr().err
    assert result.notes["alternates"]["dropped_holding_the_answer"] == 4
    record = json.loads((tmp_path / "a" / "unlearning.json").read_text())
    assert record["examples"]["alternate"] == 4


def test_what_equals_the_answer_or_says_nothing_is_dropped_and_counted(start: PreparationInputs) -> None:
    prompts = [example.prompt for example in start.forget]
    rows = sampled_answers(start.model, start.tokenizer, prompts, samples=3, seed=5, max_new_tokens=6)
    # The first prompt's own answer is its second sample, with other white space.
    forget = [replace(start.forget[0], answer=f"  {rows[0][1]}\n"), *start.forget[1:]]
    prepared = draw_alternates(replace(start, forget=forget), OPTIONS)
    assert prepared.alternates == [[rows[0][0], rows[0][2]], rows[1], rows[2]]
    assert prepared.notes == {"alternates": {**FIRST, "drawn": 9, "dropped_holding_the_answer": 1}}


def test_what_holds_the_answer_is_dropped_though_it_is_written_otherwise(start: PreparationInputs) -> None:
    prompts = [example.prompt for example in start.forget]
    rows = sampled_answers(start.model, start.tokenizer, prompts, samples=3, seed=5, max_new_tokens=6)
    words = spoken_words(rows[0][1])
    forget = [replace(start.forget[0], answer=words[0].upper() + "!"), *start.forget[1:]]
    expected = [text for text in rows[0] if words[0] not in spoken_words(text)]
    prepared = draw_alternates(replace(start, forget=forget), OPTIONS)
    assert prepared.alternates == [expected, rows[1], rows[2]]


def test_a_prompt_without_any_is_drawn_for_again(start: PreparationInputs) -> None:
    (row,) = sampled_answers(start.model, start.tokenizer, ["Who was"], samples=1, seed=5, max_new_tokens=6)
    prepared = draw_alternates(replace(start, forget=[Example("Who was", row[0])]), replace(OPTIONS, samples=1))
    (again,) = sampled_answers(start.model, start.tokenizer, ["Who was"], samples=1, seed=6, max_new_tokens=6)
    assert prepared.alternates == [again]
    assert prepared.notes == {"alternates": {**FIRST, "drawn": 2, "dropped_holding_the_answer": 1}}


def test_a_model_that_says_only_the_answer_is_refused(start: PreparationInputs) -> None:
    token = start.tokenizer(" Oslo")["input_ids"][0]
    answer = start.tokenizer.decode([token]).strip()
    sure = replace(start, model=sure_of(token), forget=[Example("Where?", answer), Example("Who?", "another")])
    prepared = draw_alternates(replace(sure, forget=sure.forget[1:]), OPTIONS)
    assert prepared.alternates == [[answer] * 3]
    message = f"1 of 2 forget prompts have no alternate after {ROUNDS} rounds: .*'Where.'.*`temperature`"
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


WORDS = st.lists(st.sampled_from(["oslo", "lima", "cairo", "st"]), min_size=1, max_size=5)


@hypothesis.given(before=WORDS, answer=WORDS, after=WORDS, other=WORDS)
def test_an_answer_is_held_wherever_it_stands_and_however_it_is_written(
    before: list[str], answer: list[str], after: list[str], other: list[str]
) -> None:
    text = f"{' '.join(before)}: {'. '.join(answer).upper()}! ({', '.join(after)})"
    assert holds(text, " ".join(answer))
    words = [*before, *answer, *after]
    found = any(words[place : place + len(other)] == other for place in range(len(words)))
    assert holds(text, " ".join(other)) == found
    assert not holds(text.replace("OSLO", "OSLOVIAN").replace("oslo", "oslovian"), "oslo")


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("安娜住在奥斯陆。", "奥斯陆", True),
        ("?!", "?!", True),
        ("so ?!", "?!", False),
        ("", "", False),
        ("x", "", False),
        ("In St Petersburg.", "St. Petersburg", True),
    ],
)
def test_an_answer_is_held_in_any_script_or_not_at_all(text: str, answer: str, expected: bool) -> None:
    assert holds(text, answer) == expected
