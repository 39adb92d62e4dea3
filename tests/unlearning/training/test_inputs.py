"""Tokenizers, chats, and data that a method does not train on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_examples, build_tiny_llama
from tests.unlearning.training.test_train import WHOLE, largest_difference, options_of
from unlearning import Example, InputError, train
from unlearning.checkpoints.load import load_weights
from unlearning.data.chat import chat_format
from unlearning.data.encoding import encode
from unlearning.data.question_answer import read_examples
from unlearning.evaluation import generation
from unlearning.evaluation.answers import answer_matches

FORGET, RETAIN = build_examples()[:4], build_examples()[4:]
SHARED: dict[str, Any] = {
    "forget": FORGET,
    "retain": RETAIN,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0,
    "max_steps": 3,
    "logging_steps": 1,
    "progress": False,
    "device": "cpu",
}


def test_a_tokenizer_without_a_pad_token_is_used_as_it_is(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.pad_token = None
    out = tmp_path / "run"
    without = train("npo", model=load_weights(model_dir), tokenizer=tokenizer, output_dir=out, eval_every=2, **SHARED)
    padded = train("npo", model=model_dir, eval_every=2, **SHARED)
    assert without.history == padded.history
    assert without.evaluations == padded.evaluations
    assert tokenizer.pad_token is None
    assert PreTrainedTokenizerFast.from_pretrained(out).pad_token is None


CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One that writes <bos> itself, as its template does, and ends a turn by another token than a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<user>", "<assistant>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{e.prompt} {e.answer}" for e in build_examples()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", chat_template=CHAT_TEMPLATE
    )


def test_a_chat_is_trained_and_answered_in_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second <bos>, and an answer ends where the template ends a turn."""
    tokenizer = chat_tokenizer()
    questions = [
        {"question": example.prompt.removeprefix("Question: ").removesuffix("\nAnswer:"), "answer": example.answer}
        for example in build_examples()
    ]
    data = tmp_path / "retain.json"
    data.write_text(json.dumps(questions))
    prompts: list[list[int]] = []
    real = generation._generate

    def watched(model: Any, batch: list[list[int]], *rest: Any, **kwargs: Any) -> list[list[int]]:
        prompts.extend(batch)
        return real(model, batch, *rest, **kwargs)

    monkeypatch.setattr(generation, "_generate", watched)
    settings = {**SHARED, "retain": data, "forget": None, "batch_size": 8, "learning_rate": 1e-2, "max_steps": 25}
    result = train(
        "finetune",
        model=build_tiny_llama(),
        tokenizer=tokenizer,
        chat=True,
        eval_every=1000,
        eval_examples=8,
        **settings,
    )
    bos, opened, end = tokenizer.convert_tokens_to_ids(["<bos>", "<assistant>", "<end>"])
    assert len(prompts) == 16  # before and after
    for ids in prompts:
        assert ids[0] == bos and ids.count(bos) == 1 and ids[-1] == opened
    assert result.final["retain_exact"] == 1
    chat = chat_format(tokenizer)
    examples = [Example(chat.prompt(each["question"]), each["answer"]) for each in questions]
    spans = encode(tokenizer, examples, append_eos=True, max_length=None, chat=chat).spans
    assert {tuple(span.input_ids[: span.answer_start]) for span in spans} == {tuple(ids) for ids in prompts}
    assert all(span.input_ids[-1] == end for span in spans)
    # Taken for plain prompts they begin once all the same, but the answers do not end.
    prompts.clear()
    wrong = answer_matches(result.model, tokenizer, examples, batch_size=8, max_new_tokens=12)
    assert all(ids.count(bos) == 1 for ids in prompts)
    assert wrong["exact"] < 1
    assert read_examples(data)  # the same file is plain questions and answers without --chat


def test_a_foreign_tokenizer_is_refused(model_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(100)
    with pytest.raises(InputError, match=r"`tokenizer` .* token \d+ .* 100 tokens"):
        train("npo", model=model, tokenizer=tokenizer, progress=False, **options_of("npo"))


def test_retain_data_that_a_method_does_not_train_on_are_watched(model_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**WHOLE, "max_steps": 2, "progress": False, "forget": FORGET}
    alone = train("ga", model=model_dir, **settings)
    watched = train("ga", model=model_dir, retain=RETAIN, output_dir=tmp_path / "ga", **settings)
    assert largest_difference(alone.model, watched.model) == 0
    assert "retain_nll" not in alone.evaluations[-1]
    assert watched.evaluations[-1]["retain_nll"] > 0
    assert "| retain | for evaluation only |" in (tmp_path / "ga" / "README.md").read_text()
