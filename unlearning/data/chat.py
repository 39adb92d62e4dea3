"""A tokenizer's chat template around questions, with a fixed date."""

import json
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError
from unlearning.data.template_sandbox import Request, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_DATE = "26 Jul 2024"
"""Date that Llama 3's template writes if it is given none."""

_DATE_FORMAT = "%d %b %Y"
_QUESTION = " ".join(f"unlearningquestion{number}" for number in range(12))
_ANSWER = "unlearninganswer"


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
        opened: Prompts end with the template's generation prompt; if not, as its finished answers begin.
    """

    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    date: str
    preface: str = ""
    separator: str | None = None
    turn_end: str = ""
    opened: bool = True

    def prompt(self, question: str) -> str:
        """Return the text that the model reads before it answers.

        Args:
            question: The question.

        Returns:
            The text.

        Raises:
            InputError: The template fails, or leaves out a part of the question.
        """
        if self.opened:
            text = _render(self.tokenizer, self.date, [("user", question)], opened=True) + self.preface
        else:
            turns = [("user", question), ("assistant", _ANSWER)]
            text = _render(self.tokenizer, self.date, turns, opened=False).rpartition(_ANSWER)[0].rstrip()
        if not _holds(text, question):
            raise InputError(
                "`chat` cannot be used: the tokenizer's chat template leaves out or changes a part of the question "
                f"{_cut(question)!r}: it writes {_cut(text)!r}; use `template`"
            )
        return text


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
        InputError: The tokenizer has no chat template, or several and no default; the template fails, takes too much
            time or memory, or leaves out the question; or the date has another form.

    Warns:
        UserWarning: The template's finished answers do not begin with its generation prompt.
    """
    if not tokenizer.chat_template:
        raise InputError("`chat` cannot be used: the tokenizer has no chat template; use `template`")
    _parse_date(date)
    opened = ChatFormat(tokenizer, date).prompt(_QUESTION)
    whole = _render(tokenizer, date, [("user", _QUESTION), ("assistant", _ANSWER)], opened=False)
    before, found, after = whole.partition(_ANSWER)
    if not found:
        return ChatFormat(tokenizer, date)
    if not before.startswith(opened):
        prompt = before.rstrip()
        warnings.warn(
            f"the chat template's generation prompt ends in {opened[-40:]!r}, and its finished answers begin after "
            f"{before[-40:]!r}: prompts end as finished answers begin",
            stacklevel=2,
        )
        return ChatFormat(tokenizer, date, "", before[len(prompt) :], after.rstrip(), opened=False)
    between = before[len(opened) :]
    preface, separator = (between, "") if between.strip() else ("", between)
    return ChatFormat(tokenizer, date, preface, separator, after.rstrip())


def _render(tokenizer: "PreTrainedTokenizerBase", date: str, turns: list[tuple[str, str]], *, opened: bool) -> str:
    special: dict[str, Any] = {
        name: list(map(str, token)) if isinstance(token, list | tuple) else str(token)
        for name, token in tokenizer.special_tokens_map.items()
    }
    variables = {**special, "date_string": date}
    try:
        return render(Request(_template(tokenizer), turns, variables, _parse_date(date), opened))
    except InputError as error:
        raise InputError(f"`chat` cannot be used: the tokenizer's chat template {error}; use `template`") from None


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    given: Any = tokenizer.chat_template
    if isinstance(given, dict):
        if "default" not in given:
            names = ", ".join(sorted(map(str, given)))
            raise InputError(f"is one of several ({_cut(names)}), none of which is the default")
        given = given["default"]
    if not isinstance(given, str):
        raise InputError(f"is {type(given).__name__}, not text")
    return given


def _holds(text: str, question: str) -> bool:
    """Return whether a rendered text holds the question, white space aside, as it is or as JSON writes it."""
    plain = " ".join(text.split())
    written = (question, json.dumps(question, ensure_ascii=False)[1:-1])
    return any(" ".join(form.split()) in plain for form in written)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


def _parse_date(date: str) -> datetime:
    try:
        return datetime.strptime(date, _DATE_FORMAT)
    except ValueError:
        raise InputError(f"`chat_date` must be a date such as {DEFAULT_CHAT_DATE!r}, got {date!r}") from None
