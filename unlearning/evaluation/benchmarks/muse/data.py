"""MUSE's data of a corpus: continuations, questions with solved examples, texts to be told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unlearning.common.errors import InputError, check_at_least, nearest
from unlearning.data import muse
from unlearning.data.named import AbsentData, data_directory
from unlearning.evaluation.benchmarks.membership.texts import Source, Text, check_sets

CORPORA = {"news": "News", "books": "Books"}

PARTS = {
    "verbmem": ("verbmem:forget",),
    "forget_knowmem": ("knowmem:forget_qa", "knowmem:forget_qa_icl"),
    "retain_knowmem": ("knowmem:retain_qa", "knowmem:retain_qa_icl"),
    "privleak": ("privleak:forget", "privleak:holdout"),
}
"""Data sets that each measurement reads."""


@dataclass(frozen=True)
class MuseData:
    """Data of one corpus; a measurement whose data was not found is missing, with the reason.

    Attributes:
        corpus: The corpus, news or books.
        found: Sets of each measurement: continuations; questions and solved examples; forget and hold-out texts.
        missing: Reason of each measurement that cannot be made.
    """

    corpus: str
    found: Mapping[str, tuple[Sequence[Text], ...]]
    missing: Mapping[str, str] = field(default_factory=dict)


def corpus_name(corpus: str) -> str:
    """Return the hub's name of a corpus.

    Returns:
        News or Books.

    Raises:
        InputError: There is no such corpus.
    """
    if corpus not in CORPORA:
        raise InputError(f"`corpus` must be news or books, got {corpus!r}{nearest(corpus, CORPORA)}")
    return CORPORA[corpus]


def read_muse(corpus: str, data_dir: str | Path | None = None, *, limit: int | None = None) -> MuseData:
    """Read the data of a corpus; measurements whose data is not found are listed as missing.

    Args:
        corpus: The corpus, news or books.
        data_dir: Directory that is searched before the hub; None for $DISSECT_DATA.
        limit: Use only the first N rows of each set; solved examples are always all used.

    Returns:
        The data.

    Raises:
        InputError: There is no such corpus, none of its data is found, a file or record is broken, or the hold-out
            set holds forget texts.
    """
    name = corpus_name(corpus)
    if limit is not None:
        check_at_least("limit", limit, 1)
    directory = data_directory(data_dir)
    found: dict[str, tuple[Sequence[Text], ...]] = {}
    missing: dict[str, str] = {}
    for measurement, parts in PARTS.items():
        sets = []
        for part in parts:
            try:
                records = muse.read(name, part, directory).records
            except AbsentData as error:
                missing[measurement] = str(error)
                break
            texts = Source(f"muse-{corpus}:{part}", records, "{question}").texts()
            sets.append(texts if part.endswith("_icl") else texts[:limit])
        else:
            found[measurement] = tuple(sets)
    if not found:
        raise InputError(f"no data of MUSE-{name} was found: {next(iter(missing.values()))}")
    for measurement, sets_found in found.items():
        _check_kind(corpus, measurement, sets_found)
    if "privleak" in found:
        check_sets(*found["privleak"])
    return MuseData(corpus, found, missing)


def _check_kind(corpus: str, measurement: str, sets: Sequence[Sequence[Text]]) -> None:
    for part, texts in zip(PARTS[measurement], sets, strict=True):
        for number, text in enumerate(texts, start=1):
            if bool(text.prompt.strip()) == (measurement == "privleak"):
                wanted = "a text" if measurement == "privleak" else "prompt and answer"
                raise InputError(
                    f"muse-{corpus}:{part}, record {number}: must be {wanted}. Download MUSE's files again."
                )
