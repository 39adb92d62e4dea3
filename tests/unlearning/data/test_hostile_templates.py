"""Chat templates that harm at the second turn, at a later text, by chance or slowly: one line each, in bounded time."""

import signal
import time
import warnings
from collections.abc import Iterator
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.data.helpers import CHAT_TEMPLATES, build_tokenizer
from tests.unlearning.data.hostile_templates import AT_ONCE, LATER, LOOPS, each, later
from unlearning import InputError
from unlearning.data import template_sandbox
from unlearning.data.chat import DEFAULT_CHAT_DATE, ChatFormat, chat_format

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())
LONG = "Who was Ines Tallow? " * 20


@pytest.fixture(autouse=True)
def short_of_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    yield


def chat_of(template: str) -> ChatFormat:
    return chat_format(build_tokenizer(bos=True, chat_template=template))


def check_message(error: InputError, phrase: str) -> None:
    message = str(error)
    assert message.startswith("`chat` cannot be used: the tokenizer's chat template ")
    assert phrase in message and message.isprintable() and len(message) < 600


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_template_that_cannot_be_trusted_is_refused_at_once(name: str) -> None:
    template, phrase = AT_ONCE[name]
    started = time.process_time()
    with pytest.raises(InputError) as error:
        chat_of(template)
    check_message(error.value, phrase)
    assert time.process_time() - started < 1  # this process only waits


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("turns", [1, 3])
def test_a_template_that_was_harmless_before_is_refused_at_the_text_that_harms(name: str, turns: int) -> None:
    template, phrase = LATER[name]
    chat = chat_of(template)
    assert chat.prompt("Who kept the lamp?")
    with pytest.raises(InputError) as error:
        if turns == 1:
            chat.prompt(LONG)
        else:
            chat.conversation([("user", LONG), ("assistant", "She did."), ("user", LONG)])
    check_message(error.value, phrase)


@given(
    name=st.sampled_from(sorted(CHAT_TEMPLATES)),
    system=st.none() | WORDS,
    shots=st.lists(st.tuples(WORDS, WORDS), max_size=3),
    question=WORDS,
    beginning=st.none() | WORDS,
)
@settings(max_examples=60, deadline=None)
def test_several_turns_are_the_text_that_transformers_writes(
    name: str, system: str | None, shots: list[tuple[str, str]], question: str, beginning: str | None
) -> None:
    template = CHAT_TEMPLATES[name].replace("strftime_now('%d %b %Y')", f"'{DEFAULT_CHAT_DATE}'")
    tokenizer = build_tokenizer(bos=True, chat_template=template)
    turns = [("system", system)] if system else []
    for asked, answered in shots:
        turns += [("user", asked), ("assistant", answered)]
    turns += [("user", question)] + ([("assistant", beginning)] if beginning else [])
    theirs = tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        tokenize=False,
        add_generation_prompt=not beginning,
        continue_final_message=bool(beginning),
        date_string=DEFAULT_CHAT_DATE,
    )
    assert chat_format(tokenizer).conversation(turns, continued=bool(beginning)) == str(theirs)


def test_a_turn_that_is_left_out_is_named() -> None:
    chat = chat_of("{{ messages[0].content }}{% if messages|length == 2 %}{{ messages[1].content }}{% endif %}")
    with pytest.raises(InputError, match="a part of the assistant turn 'Ines'"):
        chat.conversation([("user", "Who?"), ("assistant", "Ines"), ("user", "Who?")])


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        (each("{{ m.content }}"), True),
        (each("{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"), False),
        (each("{% if m.role != 'system' %}{{ m.content }}{% endif %}"), False),
    ],
)
def test_system_turns_are_told_from_none(template: str, takes: bool) -> None:
    assert chat_of(template).takes_system() == takes


def test_a_question_that_is_written_twice_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="writes each question 2 times"):
        chat_of("{{ messages[0].content }}\n" + each("{{ m.content }}"))


def test_no_probe_gets_into_a_prompt() -> None:
    with pytest.warns(UserWarning, match="prompts end as finished answers begin"):
        chat = chat_of(each("{{ m.content }}").replace("%}[assistant]", "%}[assistant]<think>"))
    assert not chat.opened
    assert chat.prompt("Who said unlearninganswer?") == "[user]Who said unlearninganswer?[assistant]"


def test_a_template_that_repeats_answers_to_one_question_only_is_refused_there() -> None:
    with pytest.warns(UserWarning, match="prompts end as finished answers begin"):
        chat = chat_of(later("{{ messages[-1].content }}").replace("[-1]", "[0]").replace("%}[assistant]", "%}[x]"))
    assert chat.prompt("Who?")
    twice = later("{{ messages[1].content }}").replace(
        "'Tallow' in messages[-1]", "messages|length > 1 and 'Tallow' in messages[0]"
    )
    with pytest.warns(UserWarning, match="prompts end as finished answers begin"):
        chat = chat_of(twice.replace("%}[assistant]", "%}[x]"))
    with pytest.raises(InputError, match="writes an answer 2 times after the question 'Tallow"):
        chat.prompt("Tallow?")


def test_a_slow_template_is_told_of_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(template_sandbox, "TOTAL_SECONDS", 0.4)
    monkeypatch.setattr(template_sandbox, "MEAN_SECONDS", 0.002)
    slow = "{% for i in range(20000) %}{% for j in range(5) %}{% endfor %}{% endfor %}" + each("{{ m.content }}")
    with pytest.raises(InputError) as error, pytest.warns(UserWarning, match=r"is slow: it takes .* s for each text"):
        chat = chat_of(slow)
        for _ in range(1000):
            chat.prompt("Who?")
    check_message(error.value, "at most 0.002 s each are allowed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chat_of(each("{{ m.content }}!")).prompt("Who?")  # another template has its own time


def test_an_interrupted_text_is_not_the_next_one_s() -> None:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    chat, slow = chat_of(each("{{ m.content }}")), chat_of(later(LOOPS))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            slow.prompt("Tallow?")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert chat.prompt("Who?") == "[user]Who?[assistant]"


def test_a_killed_process_leaves_no_open_pipe() -> None:
    chat = chat_of(later(LOOPS))
    process = template_sandbox._WORKERS[0]._process
    assert process is not None and process.stdin is not None and process.stdout is not None
    with pytest.raises(InputError):
        chat.prompt("Tallow?")
    assert process.stdin.closed and process.stdout.closed and process.returncode is not None
