"""Texts of a membership-inference attack: the forget set, and texts that no model was trained on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.common.errors import InputError
from unlearning.data import tofu
from unlearning.data.overlap import overlap
from unlearning.data.question_answer import Example, Wrapping, examples_of
from unlearning.data.records import Record
from unlearning.data.sources import find_records


@dataclass(frozen=True)
class Text:
    """A text that may have been trained on.

    Attributes:
        prompt: Wrapped text before the scored one; empty for a document.
        answer: Text that is scored.
        id: Identifier of the text.
        group: Group of the text, which the bootstrap draws whole.
    """

    prompt: str
    answer: str
    id: str = ""
    group: str = ""


@dataclass(frozen=True)
class Source:
    """Records before they are wrapped.

    Attributes:
        name: Name or file, as the user gave it.
        records: Records of any training format.
        template: Default text around each question.
    """

    name: str
    records: Sequence[Record]
    template: str

    def texts(self, wrapping: Wrapping | None = None) -> list[Text]:
        """Return the texts, with the records' `id` and `group`; TOFU's rows are grouped by their authors.

        Args:
            wrapping: Text around each question; None for the template.

        Returns:
            One text per record, in the same order.

        Raises:
            InputError: A record has no text or another form; the message names the record.
        """
        texts = []
        for place, record in enumerate(self.records):
            where = f"{self.name}, record {place + 1}"
            try:
                found = examples_of([record], wrapping or Wrapping(self.template), source="")
            except InputError as error:
                raise InputError(f"{where}{str(error).removeprefix(', record 1')}") from None
            if not found:
                raise InputError(f"{where}: the text is empty and cannot be scored. Remove it.")
            group = record.get("group") or record.get("author") or ""
            if not group and self.name.startswith("tofu:"):
                group = tofu.author(place)
            texts.append(Text(found[0].prompt, found[0].answer, str(record.get("id") or ""), str(group)))
        return texts


def read_source(name: str | Path, data_dir: str | Path | None = None) -> Source:
    """Read the records of a name or a file, as `unlearning.data.sources.read_training_data` does.

    Args:
        name: Name of a data set, or a file.
        data_dir: Directory that holds named data sets; None for $DISSECT_DATA, then the hub.

    Returns:
        The records, not wrapped yet.

    Raises:
        InputError: The name is unknown, the file is missing or broken, or the data is neither local nor on the hub.
    """
    found = find_records(name, data_dir)
    return Source(str(name), found.records, found.template)


def check_sets(forget: Sequence[Text], holdout: Sequence[Text]) -> tuple[str, ...]:
    """Check that both sets hold texts and share none.

    Args:
        forget: Texts of the forget set.
        holdout: Texts of the hold-out set.

    Returns:
        One note if the sets share prompts with different answers, else none.

    Raises:
        InputError: A set is empty, or the sets share texts; the message says how many.
    """
    for name, texts in (("forget", forget), ("hold-out", holdout)):
        if not texts:
            raise InputError(f"the {name} set must hold at least one text, got none")
    found = overlap(*([Example(text.prompt, text.answer) for text in texts] for texts in (forget, holdout)))
    if found.rows:
        raise InputError(
            f"forget and hold-out overlap: {found.rows} of the {found.forget} forget rows are in the hold-out set too "
            f"(the first: {found.first!r}). A hold-out set holds texts that no model was trained on."
        )
    if found.prompts:
        return (f"{found.prompts} of the {found.forget} forget prompts are in the hold-out set with another answer",)
    return ()


def note_of_sizes(forget: str, holdout: str) -> tuple[str, ...]:
    """Return a note if a TOFU forget set is compared with the hold-out set of another size, else none."""
    sizes = [re.fullmatch(rf"tofu:{kind}(\d\d)", name) for kind, name in (("forget", forget), ("holdout", holdout))]
    if None in sizes or sizes[0][1] == sizes[1][1]:  # type: ignore[index]
        return ()
    return (f"{holdout} belongs to another split than {forget}: published numbers use holdout{sizes[0][1]}",)  # type: ignore[index]
