"""The texts of a membership-inference attack: those to be forgotten, and those that no model was trained on."""

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
        prompt: what stands before it, wrapped; empty for a document.
        answer: what is scored.
        id, group: its own, and that of the texts that are drawn together with it.
    """

    prompt: str
    answer: str
    id: str = ""
    group: str = ""


@dataclass(frozen=True)
class Source:
    """Records before they are wrapped.

    Attributes:
        name: as the user gave it.
        records: of any training format.
        template: what wraps questions where the user has no wish.
    """

    name: str
    records: Sequence[Record]
    template: str

    def texts(self, wrapping: Wrapping | None = None) -> list[Text]:
        """The texts, with the records' `id` and `group`; TOFU's rows are grouped by their authors.

        Raises:
            InputError: a record without text, or of another form (which record).
        """
        texts = []
        for place, record in enumerate(self.records):
            where = f"{self.name}, record {place + 1}"
            try:
                found = examples_of([record], wrapping or Wrapping(self.template), source="")
            except InputError as error:
                raise InputError(f"{where}{str(error).removeprefix(', record 1')}") from None
            if not found:
                raise InputError(f"{where}: the text is empty and cannot be scored; remove it")
            group = record.get("group") or record.get("author") or ""
            if not group and self.name.startswith("tofu:"):
                group = tofu.author(place)
            texts.append(Text(found[0].prompt, found[0].answer, str(record.get("id") or ""), str(group)))
        return texts


def read_source(name: str | Path, data_dir: str | Path | None = None) -> Source:
    """What a name or a file stands for, as in `unlearning.data.sources.read_training_data`.

    Raises:
        InputError: an unknown name, a file that is missing or broken, or data that is neither here nor on the hub.
    """
    found = find_records(name, data_dir)
    return Source(str(name), found.records, found.template)


def check_sets(forget: Sequence[Text], holdout: Sequence[Text]) -> tuple[str, ...]:
    """Refuse a hold-out set that holds forget texts, and empty sets; say where the two share prompts only.

    Returns:
        Notes: one where prompts are shared under other answers, else none.

    Raises:
        InputError: a set is empty, or texts are shared (how many).
    """
    for name, texts in (("forget", forget), ("hold-out", holdout)):
        if not texts:
            raise InputError(f"the {name} set is empty; there is nothing to compare")
    found = overlap(*([Example(text.prompt, text.answer) for text in texts] for texts in (forget, holdout)))
    if found.rows:
        raise InputError(
            f"forget and hold-out overlap: {found.rows} of the {found.forget} forget rows are in the hold-out set too "
            f"(the first: {found.first!r}); a hold-out set is of texts that no model was trained on"
        )
    if found.prompts:
        return (f"{found.prompts} of the {found.forget} forget prompts are in the hold-out set with another answer",)
    return ()


def note_of_sizes(forget: str, holdout: str) -> tuple[str, ...]:
    """A note where a TOFU forget set is compared with the hold-out set of another size."""
    sizes = [re.fullmatch(rf"tofu:{kind}(\d\d)", name) for kind, name in (("forget", forget), ("holdout", holdout))]
    if None in sizes or sizes[0][1] == sizes[1][1]:  # type: ignore[index]
        return ()
    return (f"{holdout} belongs to another split than {forget}: published numbers are against holdout{sizes[0][1]}",)  # type: ignore[index]
