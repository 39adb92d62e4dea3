"""A tokenizer's chat template around questions, with a date that does not move."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_DATE = "26 Jul 2024"
"""What Llama 3's template writes where it is given no date."""

_DATE_FORMAT = "%d %b %Y"
_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_QUESTION, _ANSWER = "unlearningquestion", "unlearninganswer"


@dataclass(frozen=True)
class ChatFormat:
    """How a chat template wraps a question and its answer; `chat_format` makes it.

    Attributes:
        tokenizer: whose template it is.
        date: what the template takes for today.
        preface: what the template writes between its generation prompt and an answer other than white space, such
            as an empty block of reasoning; part of every prompt.
        separator: white space between prompt and answer, or None where the template does not say.
        turn_end: what the template writes after an answer, such as `<|eot_id|>`; empty where it writes nothing.
    """

    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    date: str
    preface: str = ""
    separator: str | None = None
    turn_end: str = ""

    def prompt(self, question: str) -> str:
        """The text that the model reads before it answers."""
        return _render(self.tokenizer, self.date, [("user", question)], opened=True) + self.preface


def chat_format(tokenizer: "PreTrainedTokenizerBase", date: str = DEFAULT_CHAT_DATE) -> ChatFormat:
    """Read off a tokenizer's chat template what it writes around an answer.

    Templates that insert the date of today would make training, evaluation and a second run differ; they get the
    same date always.

    Args:
        tokenizer: of the model.
        date: in the form `26 Jul 2024`.

    Raises:
        InputError: the tokenizer has no chat template, its template refuses a question, or the date has another form.
    """
    if not tokenizer.chat_template:
        raise InputError("--chat: the tokenizer has no chat template; use --template")
    _parse_date(date)
    opened = _render(tokenizer, date, [("user", _QUESTION)], opened=True)
    whole = _render(tokenizer, date, [("user", _QUESTION), ("assistant", _ANSWER)], opened=False)
    before, found, after = whole.partition(_ANSWER)
    if not found or not before.startswith(opened):
        return ChatFormat(tokenizer, date)
    between = before[len(opened) :]
    preface, separator = (between, "") if between.strip() else ("", between)
    return ChatFormat(tokenizer, date, preface, separator, after.rstrip())


def _render(tokenizer: "PreTrainedTokenizerBase", date: str, turns: list[tuple[str, str]], *, opened: bool) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=_without_clock(tokenizer.get_chat_template(), date),
            tokenize=False,
            add_generation_prompt=opened,
            date_string=date,
        )
    except TemplateError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--chat: the tokenizer's chat template refuses a question ({reason}); use --template"
        ) from None
    return str(text)


def _without_clock(template: str, date: str) -> str:
    """A template with the date written in where it asks the clock (a template is given no functions to ask instead)."""
    day = _parse_date(date)
    fixed = _CLOCK_CALL.sub(lambda call: call[1] + day.strftime(call[2]) + call[1], template)
    if "strftime_now(" in fixed:
        raise InputError("--chat: the tokenizer's chat template asks for the time in an unknown way; use --template")
    return fixed


def _parse_date(date: str) -> datetime:
    try:
        return datetime.strptime(date, _DATE_FORMAT)
    except ValueError:
        raise InputError(f"chat_date={date!r}: write it as {DEFAULT_CHAT_DATE!r}") from None
