"""A tokenizer's chat template around questions, with a fixed date."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_DATE = "26 Jul 2024"
"""Date that Llama 3's template writes if it is given none."""

_DATE_FORMAT = "%d %b %Y"
_CLOCK_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_QUESTION, _ANSWER = "unlearningquestion", "unlearninganswer"


@dataclass(frozen=True)
class ChatFormat:
    """The text that a chat template writes around a question and its answer; made by `chat_format`.

    Attributes:
        tokenizer: The tokenizer whose template it is.
        date: Date that the template writes as today's.
        preface: Text other than white space that the template writes between its generation prompt and an answer, such
            as an empty block of reasoning; part of every prompt.
        separator: White space between prompt and answer; None if the template does not show it.
        turn_end: Text that the template writes after an answer, such as `<|eot_id|>`; empty if there is none.
    """

    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    date: str
    preface: str = ""
    separator: str | None = None
    turn_end: str = ""

    def prompt(self, question: str) -> str:
        """Return the text that the model reads before it answers."""
        return _render(self.tokenizer, self.date, [("user", question)], opened=True) + self.preface


def chat_format(tokenizer: "PreTrainedTokenizerBase", date: str = DEFAULT_CHAT_DATE) -> ChatFormat:
    """Find out what a tokenizer's chat template writes around an answer.

    Templates that insert today's date would make training, evaluation and a second run differ, so all get the same
    date.

    Args:
        tokenizer: The model's tokenizer.
        date: A date such as `26 Jul 2024`.

    Returns:
        The format.

    Raises:
        InputError: The tokenizer has no chat template, the template refuses a question, or the date has another form.
    """
    if not tokenizer.chat_template:
        raise InputError("`chat` cannot be used: the tokenizer has no chat template; use `template`")
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
            f"`chat` cannot be used: the tokenizer's chat template refuses a question ({reason}); use `template`"
        ) from None
    return str(text)


def _without_clock(template: str, date: str) -> str:
    """Write the date into a template that asks the clock, since a template cannot be given another clock."""
    day = _parse_date(date)
    fixed = _CLOCK_CALL.sub(lambda call: call[1] + day.strftime(call[2]) + call[1], template)
    if "strftime_now(" in fixed:
        raise InputError("`chat` cannot be used: the chat template uses an unsupported date function; use `template`")
    return fixed


def _parse_date(date: str) -> datetime:
    try:
        return datetime.strptime(date, _DATE_FORMAT)
    except ValueError:
        raise InputError(f"`chat_date` must be a date such as {DEFAULT_CHAT_DATE!r}, got {date!r}") from None
