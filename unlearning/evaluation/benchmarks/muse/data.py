"""What MUSE asks of a corpus: continuations, questions with worked examples, texts to be told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unlearning.common.errors import InputError, nearest
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
"""What each of the measurements reads."""


@dataclass(frozen=True)
class MuseData:
    """One corpus; a measurement whose data is not there is missing, with the reason.

    Attributes:
        corpus: news or books.
        found: by measurement, its sets: continuations; questions and worked examples; forget and hold-out texts.
        missing: by measurement, why it cannot be made.
    """

    corpus: str
    found: Mapping[str, tuple[Sequence[Text], ...]]
    missing: Mapping[str, str] = field(default_factory=dict)


def corpus_name(corpus: str) -> str:
    """The hub's name of a corpus.

    Raises:
        InputError: there is no such corpus.
    """
    if corpus not in CORPORA:
        raise InputError(f"--corpus {corpus}: no such corpus{nearest(corpus, CORPORA) or ';'} there are news, books")
    return CORPORA[corpus]


def read_muse(corpus: str, data_dir: str | Path | None = None, *, limit: int | None = None) -> MuseData:
    """Read what is there of a corpus.

    Args:
        corpus: news or books.
        data_dir: where it is looked for before the hub is; None reads $DISSECT_DATA.
        limit: the first so many rows of each set; worked examples are always all used.

    Raises:
        InputError: no such corpus, nothing of it is there, a broken file or record, or a hold-out set that holds
            forget texts.
    """
    name = corpus_name(corpus)
    if limit is not None and limit < 1:
        raise InputError(f"--limit {limit}: 1 or more")
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
        raise InputError(f"nothing of MUSE-{name} is there: {next(iter(missing.values()))}")
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
                raise InputError(f"muse-{corpus}:{part}, record {number}: should be {wanted}; get MUSE's files again")
