"""Settings of a benchmark: what the user chooses, and how data and models are read accordingly.

Every benchmark has a frozen dataclass of settings. `unlearning.evaluate(...)` and `unlearn eval` both fill it in; its
method `open` reads the data and returns a function that makes the benchmark ready for a model.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from unlearning.common.errors import InputError
from unlearning.data.chat import chat_format
from unlearning.data.question_answer import DEFAULT_TEMPLATE, Wrapping
from unlearning.evaluation.harness import Prepare
from unlearning.evaluation.subject import Runtime, Subject

Names = str | Sequence[str]
"""Several names, as a sequence or as one text with commas between them."""


class Settings(Protocol):
    """Settings of one benchmark, a dataclass whose every field has a default or must be given.

    Attributes:
        source: Paper or project that the benchmark comes from.
    """

    source: ClassVar[str]

    def open(self, runtime: Runtime, /) -> Prepare:
        """Read the data, and load the models that the benchmark needs besides the evaluated one.

        Args:
            runtime: How models are loaded and run.

        Returns:
            A function that makes the benchmark ready for a model.

        Raises:
            InputError: A setting is out of range, or data or a model cannot be read.
        """
        ...


def names_of(names: Names) -> list[str]:
    """Return names as a list; a text is split at its commas."""
    listed = names.split(",") if isinstance(names, str) else names
    return [name.strip() for name in listed if name.strip()]


def given(value: str | None) -> str | None:
    """Return None for "none" and None, and any other text as it is."""
    return None if value == "none" else value


def wrapping_of(
    subject: Subject, template: str | None, chat: bool | None, chat_date: str, *, default: str | None = None
) -> Wrapping:
    """Return what is put around questions.

    Args:
        subject: The model, whose tokenizer has the chat template.
        template: Text with `{question}` in it; None for the default.
        chat: Use the tokenizer's chat template instead.
        chat_date: Date that the chat template writes as today's.
        default: Template of the data set; None for `DEFAULT_TEMPLATE`.

    Returns:
        The wrapping of the questions.

    Raises:
        InputError: Both `template` and `chat` are given, the template has no `{question}`, or the tokenizer has no
            chat template.
    """
    if template is not None and chat:
        raise InputError("`template` and `chat` both wrap the question. Give one of them.")
    return Wrapping(
        template or default or DEFAULT_TEMPLATE, chat_format(subject.tokenizer, chat_date) if chat else None
    )
