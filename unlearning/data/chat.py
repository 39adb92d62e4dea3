"""A tokenizer's chat template around questions, with a fixed date."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from unlearning.common.errors import InputError
from unlearning.data.template_sandbox import Request, TemplateRefusal, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHAT_DATE = "26 Jul 2024"
"""Date that Llama 3's template writes if it is given none."""

_DATE_FORMAT = "%d %b %Y"
_QUESTION = " ".join(f"unlearningquestion{number}" for number in range(12))
_ANSWER = "unlearninganswer"
_OTHER_QUESTION = "What does Forgettingquestion 7 ask?"
_OTHER_ANSWER = "The other Forgettingreply of 3"
"""Shares no word, no length and no beginning with the first: what a template makes of an answer differs in the two."""

_SYSTEM = "unlearningsystem"


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
        instead: What to do where the template is refused.
    """

    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    date: str
    preface: str = ""
    separator: str | None = None
    turn_end: str = ""
    opened: bool = True
    instead: str = field(default="use `template`", repr=False, compare=False)

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
            text = self._render([("user", question)]) + self.preface
        else:
            answer = _ANSWER
            while answer in question:
                answer += "0"
            before, *others = self._finished(question, answer).split(answer)
            if len(others) != 1:
                raise self._refusal(f"writes an answer {len(others)} times after the question {_cut(question)!r}")
            text = before.rstrip()
        self._check_held(text, "question", question)
        return text

    def conversation(self, turns: Sequence[tuple[str, str]], *, continued: bool = False) -> str:
        """Return the text that the model reads after several turns.

        Args:
            turns: Role (`system`, `user` or `assistant`) and text of each turn.
            continued: The last turn is the beginning of the answer; if not, an answer is to begin.

        Returns:
            The text, which ends with the template's generation prompt or with the last turn's text.

        Raises:
            InputError: The template fails, or leaves out a part of a turn.
        """
        text = self._render(turns, opened=not continued, continued=continued)
        for role, content in turns:
            self._check_held(text, f"{role} turn", content)
        return text

    def takes_system(self) -> bool:
        """Return whether the template writes system turns; some refuse them, others leave them out."""
        try:
            text = self._render([("system", _SYSTEM), ("user", _QUESTION)])
        except TemplateRefusal:
            return False
        return _SYSTEM in text

    def _finished(self, question: str, answer: str) -> str:
        return self._render([("user", question), ("assistant", answer)], opened=False)

    def _render(self, turns: Sequence[tuple[str, str]], *, opened: bool = True, continued: bool = False) -> str:
        special: dict[str, Any] = {
            name: list(map(str, token)) if isinstance(token, list | tuple) else str(token)
            for name, token in self.tokenizer.special_tokens_map.items()
        }
        variables = {**special, "date_string": self.date}
        try:
            return render(
                Request(_template(self.tokenizer), turns, variables, parse_date(self.date), opened, continued)
            )
        except InputError as error:
            raise self._refusal(str(error), type(error)) from None

    def _check_held(self, text: str, what: str, part: str) -> None:
        """Check that a rendered text holds a part of it, white space aside, as it is or as JSON writes it."""
        plain = " ".join(text.split())
        written = (part, json.dumps(part, ensure_ascii=False)[1:-1])
        if not any(" ".join(form.split()) in plain for form in written):
            raise self._refusal(f"leaves out or changes a part of the {what} {_cut(part)!r}: it writes {_cut(text)!r}")

    def _refusal(self, clause: str, kind: type[InputError] = InputError) -> InputError:
        return kind(f"`chat` cannot be used: the tokenizer's chat template {clause}; {self.instead}")


def chat_format(
    tokenizer: "PreTrainedTokenizerBase", date: str = DEFAULT_CHAT_DATE, *, instead: str = ChatFormat.instead
) -> ChatFormat:
    """Find out what a tokenizer's chat template writes around an answer.

    Templates that insert today's date would make training, evaluation and a second run differ, so all get the same
    date.

    Args:
        tokenizer: The model's tokenizer.
        date: A date such as `26 Jul 2024`.
        instead: What to do where the template is refused, for callers that have no `template`.

    Returns:
        The format.

    Raises:
        InputError: The tokenizer has no chat template, or several and no default; the template fails, takes too much
            time or memory, leaves out the question, changes or repeats the answer, or writes around an answer what
            depends on it; or the date has another form.

    Warns:
        UserWarning: The template's finished answers do not begin with its generation prompt, or it writes the question
            more than once.
    """
    if not tokenizer.chat_template:
        raise InputError(f"`chat` cannot be used: the tokenizer has no chat template; {instead}")
    parse_date(date)
    plain = ChatFormat(tokenizer, date, instead=instead)
    found, other = (_around(plain, *probe) for probe in ((_QUESTION, _ANSWER), (_OTHER_QUESTION, _OTHER_ANSWER)))
    for name in ("opened", "preface", "separator", "turn_end"):
        first, second = getattr(found, name), getattr(other, name)
        if first != second:
            raise plain._refusal(
                "writes around one answer something else than around another "
                f"({name}: {_cut(str(first))!r}, then {_cut(str(second))!r})"
            )
    prompt = found.prompt(_QUESTION)
    if (times := prompt.count(_QUESTION)) > 1:
        warnings.warn(f"the chat template writes each question {times} times", stacklevel=2)
    if not found.opened:
        opened = plain._render([("user", _QUESTION)])
        warnings.warn(
            f"the chat template's generation prompt ends in {opened[-40:]!r}, and its finished answers begin after "
            f"{prompt[-40:]!r}: prompts end as finished answers begin",
            stacklevel=2,
        )
    return found


def _around(plain: ChatFormat, question: str, answer: str) -> ChatFormat:
    """Return the format of one question and one answer."""
    opened = plain.prompt(question)
    whole = plain._finished(question, answer)
    before, *others = whole.split(answer)
    if not others:
        if whole != plain._finished(question, _ANSWER if answer == _OTHER_ANSWER else _OTHER_ANSWER):
            raise plain._refusal(f"leaves out or changes a part of the answer {answer!r}: it writes {_cut(whole)!r}")
        return plain  # it says nothing of answers
    if len(others) > 1:
        raise plain._refusal(f"writes an answer {len(others)} times")
    turn_end = others[0].rstrip()
    if not before.startswith(opened):
        separator = before[len(before.rstrip()) :]
        return replace(plain, separator=separator, turn_end=turn_end, opened=False)
    between = before[len(opened) :]
    preface, separator = (between, "") if between.strip() else ("", between)
    return replace(plain, preface=preface, separator=separator, turn_end=turn_end)


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


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


def parse_date(date: str) -> datetime:
    """Read the date that a chat template writes as today's.

    Args:
        date: A date such as `26 Jul 2024`.

    Returns:
        The date.

    Raises:
        InputError: The date has another form.
    """
    try:
        return datetime.strptime(date, _DATE_FORMAT)
    except ValueError:
        raise InputError(f"`chat_date` must be a date such as {DEFAULT_CHAT_DATE!r}, got {date!r}") from None
