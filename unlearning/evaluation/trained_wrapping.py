"""The wrapping that a model was trained with, from the record beside its weights, as the default of how it is asked.

A model that was trained on one wrapping of its questions answers less well in another: what it knows then looks
forgotten. `unlearn train` writes template, chat and end of sequence into `unlearning.json`; `unlearn eval` and
`dissect` take them from there unless the user sets others.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from unlearning.checkpoints.locate import RECORD, locate_record
from unlearning.common.errors import InputError
from unlearning.common.places import kind_of
from unlearning.data.chat import DEFAULT_CHAT_DATE, parse_date
from unlearning.data.question_answer import DEFAULT_TEMPLATE, check_template
from unlearning.options import with_present_names

_LARGEST = 2**26
"""Bytes of the largest record that is read; a history of a million steps is smaller."""


@dataclass(frozen=True)
class TrainedWrapping:
    """What is put around questions and after answers.

    Attributes:
        template: Text with `{question}` in it; None for the data set's own, `DEFAULT_TEMPLATE` for most.
        chat: The tokenizer's chat template wraps questions instead.
        chat_date: Date that the chat template writes as today's.
        append_eos: Answers end with the end-of-sequence token, or with the end of a chat's turn.
    """

    template: str | None = None
    chat: bool = False
    chat_date: str = DEFAULT_CHAT_DATE
    append_eos: bool = True

    def __str__(self) -> str:
        """Return the wrapping in words; a template with its control signs as escapes, and cut if it is long."""
        if self.chat:
            date = "" if self.chat_date == DEFAULT_CHAT_DATE else f" with the date {self.chat_date}"
            words = f"the chat template{date}"
        elif self.template is None:
            words = f"the data set's own template, {DEFAULT_TEMPLATE!r} for most"
        else:
            text = self.template
            words = f"the template {(text if len(text) <= 80 else f'{text[:50]}...{text[-27:]}')!r}"
        return words if self.append_eos else f"{words}, and no end of sequence"

    def equals(self, other: "TrainedWrapping") -> bool:
        """Return whether both wrap alike; a data set's own template, which is not known here, counts as the default."""
        return self._parts == other._parts

    @property
    def _parts(self) -> tuple[object, ...]:
        return (self.chat_date if self.chat else self.template or DEFAULT_TEMPLATE, self.chat, self.append_eos)


@dataclass(frozen=True)
class Chosen:
    """How a model is asked.

    Attributes:
        wrapping: The wrapping.
        note: One line that says which record it comes from; None if it comes from none, or is the default.
    """

    wrapping: TrainedWrapping
    note: str | None = None


def read_trained_wrapping(name: str | Path) -> TrainedWrapping | None:
    """Read the wrapping that a model was trained with from the record beside its weights.

    Args:
        name: Name of a model (see `unlearning.checkpoints.locate.locate_checkpoint`).

    Returns:
        The wrapping; options that a record of an older version lacks have their defaults. None without a record of
        `unlearn train`.

    Raises:
        InputError: A setting of the record is refused where a user would set it: the template lacks `{question}`, is
            too long or no text, or the date or a truth value is none. Or the hub has no such model.

    Warns:
        UserWarning: The file with the record's name is no record of `unlearn train`.
    """
    file = locate_record(name)
    if file is None:
        return None
    options = _options(file)
    if options is None:
        warnings.warn(f"{file}: no record of `unlearn train`; how the model was trained is not known", stacklevel=2)
        return None
    given = {each.name: options[each.name] for each in fields(TrainedWrapping) if each.name in options}
    for key, value in given.items():
        kind, words = _KINDS[key]
        if not isinstance(value, kind):
            raise _refusal(file, f"{key} must be {words}, got {type(value).__name__}")
    found = TrainedWrapping(**given)
    if found.template is not None and found.chat:
        raise _refusal(file, "template and chat are both set")
    try:
        check_template(DEFAULT_TEMPLATE if found.template is None else found.template)
        parse_date(found.chat_date)
    except InputError as error:
        raise _refusal(file, str(error)) from None
    return found


_KINDS: dict[str, tuple[Any, str]] = {
    "template": (str | None, "text or null"),
    "chat": (bool, "true or false"),
    "chat_date": (str, "text"),
    "append_eos": (bool, "true or false"),
}
"""Type of each setting, and its name in JSON."""


def _refusal(file: Path, clause: str) -> InputError:
    clause = clause.replace("`", "").partition(". ")[0].rstrip(".")
    return InputError(f"{file}: {clause}. Set `template` or `chat` yourself, or remove the file.")


def _options(file: Path) -> Mapping[str, Any] | None:
    """Return the options of a training run; None if the file is not its record."""
    try:
        if kind_of(file) != "file" or file.stat().st_size > _LARGEST:
            return None
        options = json.loads(file.read_text(encoding="utf-8"))["configuration"]["options"]
        return with_present_names(options) if isinstance(options, dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def choose_wrapping(
    template: str | None, chat: bool | None, models: Sequence[str | Path], *, append_eos: bool | None = None
) -> Chosen:
    """Choose how models are asked: as the user says, else as the first of them with a record was trained.

    Args:
        template: Template that the user set; None for none.
        chat: Use the chat template, or the default template; None where the user says neither.
        models: Names of the models, the one that is judged first.
        append_eos: End answers with the end-of-sequence token, or do not; None where the user says neither.

    Returns:
        The wrapping, and what is to be said about it.

    Raises:
        InputError: `template` and `chat` are both set, the template is refused, or a record that decides holds a
            setting that is refused.

    Warns:
        UserWarning: A model is asked otherwise than it was trained, since the user says so or since another model was
            trained otherwise; or a record cannot be used and does not decide.
    """
    if template is not None and chat:
        raise InputError("`template` and `chat` both wrap the question. Give one of them.")
    if template is not None:
        check_template(template)
    by_user = template is not None or chat is not None
    trained = _trained(models, decides=not by_user)
    name, first = next(iter(trained.items()), ("", TrainedWrapping()))
    chosen = replace(first, append_eos=first.append_eos if append_eos is None else append_eos)
    if by_user:
        chosen = replace(chosen, template=template, chat=bool(chat))
    differing = {other: each for other, each in trained.items() if not chosen.equals(each)}
    if differing:
        as_first = chosen.equals(first)
        named = trained if as_first else differing
        shown = "; ".join(f"{other} was trained with {each}" for other, each in named.items())
        rest = f", as {name} was; set `template` or `chat` for another" if as_first else ""
        warnings.warn(f"{shown}; asked with {chosen}{rest}", stacklevel=2)
    from_record = not by_user and chosen.equals(first) and not first.equals(TrainedWrapping())
    return Chosen(chosen, f"asked as {name} was trained ({RECORD}): {chosen}" if from_record else None)


def _trained(models: Sequence[str | Path], *, decides: bool) -> dict[str, TrainedWrapping]:
    """Return the wrappings of those models that have a record; a refused record matters only if it may decide."""
    found: dict[str, TrainedWrapping] = {}
    for name in dict.fromkeys(map(str, models)):
        try:
            wrapping = read_trained_wrapping(name)
        except InputError as error:
            if decides and not found:
                raise
            warnings.warn(f"not compared with how {name} was trained: {error}", stacklevel=3)
            continue
        if wrapping is not None:
            found[name] = wrapping
    return found
