"""Chat templates from strangers: what they write is transformers' text, and what they do otherwise is one line."""

import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import CHAT_TEMPLATES, build_tokenizer
from unlearning import InputError
from unlearning.data import template_sandbox
from unlearning.data.chat import DEFAULT_CHAT_DATE, chat_format

SHORT = 0.2
"""Seconds that a template has in these tests."""

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)

QUESTION = "{{ messages[0].content }}"

HOSTILE = {
    "a type error": ("{{ 1 + 'a' }}", "fails (TypeError"),
    "a division by zero": ("{{ 1 / 0 }}", "fails (ZeroDivisionError"),
    "a huge range": ("{% for i in range(10 ** 12) %}x{% endfor %}", "Range too big"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
    "an include": ("{% include 'x' %}", "fails (TypeError: no loader"),
    "an import": ("{% import '/etc/passwd' as x %}", "no loader"),
    "Python's classes": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "a syntax error": ("{% if", "TemplateSyntaxError"),
    "an unknown filter": ("{{ messages | frobnicate }}", "TemplateAssertionError"),
    "a missing message": ("{{ messages[5].content.strip() }}", "UndefinedError"),
    "its own refusal": ("{{ raise_exception('only systems\\nmay speak') }}", "refuses a question (only systems may"),
    "a long refusal": ("{{ raise_exception('no ' * 9999) }}", "refuses a question (no no"),
    "half a character": (QUESTION + "\ud83d", "UnicodeEncodeError"),
    "brackets without end": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "nested too deep"),
    "blocks without end": ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "nested too deep"),
    "a padded text": ("{{ 'a' | center(10 ** 10) }}", "memory"),
    "a long number": ("{{ '%10000000000d' % 1 }}", "memory"),
    "a long text": (QUESTION + "{{ 'x' * 3000000 }}", "writes 3000"),
    "a long template": (QUESTION + " " * 2_000_000, "characters"),
    "no question": ("hello", "leaves out"),
    "the question's beginning": ("{{ messages[0].content[:3] }}", "it writes 'unl'"),
    "most of the question": ("{{ messages[0].content[:200] }}", "leaves out"),
    "lists of parts": (
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
        "leaves out",
    ),
}

ENDLESS = {
    "loops": ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "takes more than"),
    "doubled texts": (
        "{% set n = namespace(a='x' * 999) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
        "(takes more than|memory)",
    ),
}


@pytest.fixture
def short_of_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(template_sandbox, "SECONDS", SHORT)
    yield


def refusal(template: object) -> str:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError) as error:
        chat_format(tokenizer)
    message = str(error.value)
    assert message.startswith("`chat` cannot be used: the tokenizer's chat template ")
    assert message.isprintable() and len(message) < 600
    return message


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_template_does_wrong_is_its_error_in_one_line(name: str) -> None:
    template, phrase = HOSTILE[name]
    assert phrase in refusal(template)


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.usefixtures("short_of_time")
def test_a_template_without_end_is_ended(name: str) -> None:
    import re

    template, phrase = ENDLESS[name]
    started = time.process_time()
    assert re.search(phrase, refusal(template))
    assert time.process_time() - started < 1  # this process only waits
    assert chat_format(build_tokenizer(chat_template=QUESTION)).prompt("Who?") == "Who?"


def test_several_templates_need_a_default() -> None:
    assert "one of several (rag, tool_use), none of which is the default" in refusal({"tool_use": "a", "rag": "b"})
    tokenizer = build_tokenizer()
    tokenizer.chat_template = {"tool_use": "a", "default": QUESTION}  # type: ignore[assignment]
    assert chat_format(tokenizer).prompt("Who?") == "Who?"
    assert "is int, not text" in refusal(7)


def test_a_template_sees_no_environment_and_no_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    assert "A_TOKEN" not in template_sandbox.environment()


@given(question=TEXTS, name=st.sampled_from(sorted(CHAT_TEMPLATES)))
@settings(max_examples=60, deadline=None)
def test_prompts_are_the_text_that_transformers_writes(question: str, name: str) -> None:
    tokenizer = build_tokenizer(
        bos=True, chat_template=CHAT_TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'now'")
    )
    chat = chat_format(tokenizer)
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tokenize=False,
        add_generation_prompt=True,
        date_string=DEFAULT_CHAT_DATE,
    )
    assert chat.prompt(question) == str(theirs) + chat.preface


def test_a_question_that_a_template_changes_is_refused() -> None:
    chat = chat_format(build_tokenizer(chat_template="{{ messages[0].content.split('</think>')[-1] }}"))
    assert chat.prompt("Who?") == "Who?"
    with pytest.raises(InputError, match="leaves out or changes a part of the question 'Who </think> is it"):
        chat.prompt("Who </think> is it?")
    quoting = chat_format(build_tokenizer(chat_template="{{ messages[0].content | tojson }}"))
    assert quoting.prompt('Who is "Ö"?\n') == '"Who is \\"Ö\\"?\\n"'


def test_where_answers_begin_otherwise_than_the_generation_prompt_prompts_end_as_answers_begin() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content.split('</think>')[-1] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
    )
    tokenizer = build_tokenizer(chat_template=template)
    with pytest.warns(UserWarning, match="generation prompt ends in .*think>.*, and its finished answers begin after"):
        chat = chat_format(tokenizer)
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ines"}]
    finished = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert chat.prompt("Who?") + f"{chat.separator}Ines{chat.turn_end}" == finished
