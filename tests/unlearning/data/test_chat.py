"""Chat templates: a date that stands still, and answers that end as the template ends them."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from dissect.prompts.loading import load_prompts
from tests.unlearning.data.helpers import CHAT_TEMPLATES, CLOCK, LLAMA_3, build_tokenizer
from unlearning import Example, InputError
from unlearning.data.chat import chat_format
from unlearning.data.encoding import encode
from unlearning.data.question_answer import Wrapping, examples_of
from unlearning.data.spans import encode_answer

QUESTION, ANSWER = "Who kept the lamp?", "Ines Tallow"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_prompt_answer_and_turn_end_are_the_templates_own_text(name: str) -> None:
    tokenizer = build_tokenizer(bos=True, chat_template=CHAT_TEMPLATES[name])
    chat = chat_format(tokenizer, "01 Mar 2023")
    rendered = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
            tokenize=False,
            date_string="01 Mar 2023",
        )
    ).replace(datetime.now().strftime("%d %b %Y"), "01 Mar 2023")
    (example,) = examples_of([{"question": QUESTION, "answer": ANSWER}], Wrapping(chat=chat), source="here")
    (span,) = encode(tokenizer, [example], append_eos=True, max_length=None, chat=chat).spans
    assert tokenizer.decode(span.input_ids) == rendered.rstrip()
    assert span.input_ids == tokenizer(rendered.rstrip(), add_special_tokens=False)["input_ids"]
    ending = rendered.rstrip().rpartition(ANSWER)[2]
    assert tokenizer.decode(span.input_ids[span.answer_start :]).lstrip() == ANSWER + ending
    (bare,) = encode(tokenizer, [example], append_eos=False, max_length=None, chat=chat).spans
    assert tokenizer.decode(bare.input_ids[bare.answer_start :]).lstrip() == ANSWER


@pytest.mark.parametrize("template", [LLAMA_3, CLOCK, LLAMA_3.replace("strftime_now('%d %b %Y')", "'01 Jan 2000'")])
def test_the_date_is_the_one_that_is_given(template: str) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    assert "26 Jul 2024" in chat_format(tokenizer).prompt(QUESTION)
    assert "05 May 2021" in chat_format(tokenizer, "05 May 2021").prompt(QUESTION)
    day = build_tokenizer(chat_template="{% set form = '%j' %}{{ strftime_now(form) }}" + template)
    assert chat_format(day, "05 May 2021").prompt(QUESTION).startswith("125")
    with pytest.raises(InputError, match="`chat_date`.*'2024-07-26'"):
        chat_format(tokenizer, "2024-07-26")


def test_a_turn_end_of_the_templates_own_is_no_end_of_sequence() -> None:
    tokenizer = build_tokenizer(chat_template=LLAMA_3)
    assert chat_format(tokenizer).turn_end == "<|eot_id|>" != tokenizer.eos_token
    tokenizer.eos_token = None  # none is needed then
    (span,) = encode(
        tokenizer,
        [Example(chat_format(tokenizer).prompt(QUESTION), ANSWER)],
        append_eos=True,
        max_length=None,
        chat=chat_format(tokenizer),
    ).spans
    assert tokenizer.decode(span.input_ids[-1:]) == "<|eot_id|>"


def test_a_template_that_says_nothing_of_answers_ends_with_the_end_of_sequence() -> None:
    tokenizer = build_tokenizer(chat_template="{{ messages[0]['content'] }} says")
    chat = chat_format(tokenizer)
    span = encode_answer(tokenizer, chat.prompt("Ines"), "no", append_eos=True, chat=chat)
    assert tokenizer.decode(span.input_ids) == "Ines says no<eos>"


def test_documents_are_no_chat() -> None:
    tokenizer = build_tokenizer(bos=True, chat_template=LLAMA_3)
    chat = chat_format(tokenizer)
    in_chat = encode(tokenizer, [Example("", "The lamp")], append_eos=True, max_length=None, chat=chat)
    assert in_chat == encode(tokenizer, [Example("", "The lamp")], append_eos=True, max_length=None)
    assert in_chat.spans[0].input_ids[0] == tokenizer.bos_token_id


def test_what_cannot_chat_is_refused() -> None:
    with pytest.raises(InputError, match="`chat`.*no chat template"):
        chat_format(build_tokenizer())
    refusing = build_tokenizer(chat_template="{{ raise_exception('only systems\nmay speak') }}")
    with pytest.raises(InputError) as error:
        chat_format(refusing)
    assert "refuses a question (only systems may speak)" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "hello",
        "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% if loop.index == 2 %}{{ m.content | length }}{% endif %}{% endfor %}",
    ],
)
def test_a_refusal_says_what_the_command_has(template: str | None) -> None:
    with pytest.raises(InputError, match="; leave `chat` out$"):
        chat_format(build_tokenizer(chat_template=template), instead="leave `chat` out")
    with pytest.raises(InputError, match="; use `template`$"):
        chat_format(build_tokenizer(chat_template=template))


def test_a_later_refusal_says_so_too() -> None:
    template = "{% for m in messages %}{{ m.content if 'nettle' not in m.content else '' }}{% endfor %}"
    chat = chat_format(build_tokenizer(chat_template=template), instead="leave `chat` out")
    for late in (chat.prompt, lambda text: chat.conversation([("user", "a"), ("assistant", "b"), ("user", text)])):
        with pytest.raises(InputError, match="leaves out or changes .*; leave `chat` out$"):
            late("Is it a nettle?")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_is_trained_is_what_dissect_scores(tmp_path: Path, name: str) -> None:
    tokenizer = build_tokenizer(bos=True, chat_template=CHAT_TEMPLATES[name])
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"question": QUESTION, "answer": ANSWER}]))
    (scored,) = load_prompts(path, tokenizer, chat=True).items
    chat = chat_format(tokenizer)
    trained = encode_answer(tokenizer, chat.prompt(QUESTION), ANSWER, chat=chat)
    assert (list(scored.input_ids), scored.answer_start) == (trained.input_ids, trained.answer_start)
