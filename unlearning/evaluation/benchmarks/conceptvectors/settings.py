"""Settings of ConceptVectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from unlearning.common.errors import InputError, check_at_least, naming
from unlearning.data.concept_vectors import find_concepts
from unlearning.data.named import data_directory
from unlearning.data.records import Record, read_records
from unlearning.evaluation.benchmarks.conceptvectors import benchmark
from unlearning.evaluation.harness import Prepare
from unlearning.evaluation.settings import given
from unlearning.evaluation.subject import Runtime


@dataclass(frozen=True, kw_only=True)
class ConceptVectorsSettings:
    """Were concepts erased from the parameters, and from what the model says?

    Attributes:
        base: The model before unlearning, which every score compares with.
        concepts: File of ConceptVectors' records; None for those in `data_dir`.
        vectors: Compare the value vectors that the records name.
        noise: Standard deviations of noise on the base's vectors, as numbers or a text with commas; the paper's is 0.1.
        max_new_tokens: Maximum number of tokens of a text.
        limit: Use only the first N concepts.
        per_concept: Use only the first N questions of each kind per concept.
        data_dir: Directory that holds conceptvectors/; None for $DISSECT_DATA, then the hub.
        seed: Random seed of the noise and of the bootstrap.
    """

    source: ClassVar[str] = "ConceptVectors, arXiv 2406.11614"

    base: str | None = None
    concepts: str | Path | None = None
    vectors: bool = True
    noise: str | Sequence[float] = ()
    max_new_tokens: int = 100
    limit: int | None = None
    per_concept: int | None = None
    data_dir: str | Path | None = None
    seed: int = 0

    def open(self, runtime: Runtime) -> Prepare:
        """Read the concepts and load the base; see `Settings.open`."""
        base = given(self.base)
        if base is None:
            raise InputError("give `base`, the model before unlearning: every score compares with it.")
        if self.limit is not None:
            check_at_least("limit", self.limit, 1)
        noise = _scales(self.noise)
        if noise and not self.vectors:
            raise InputError("`noise` changes the vectors, which `vectors=False` leaves out. Give one of them.")
        records, source = self._records()
        return partial(
            benchmark.prepare,
            concepts=benchmark.concepts_of(records[: self.limit], source, per_concept=self.per_concept),
            base=benchmark.Base(runtime.open(base)),
            vectors=self.vectors,
            noise=noise,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )

    def _records(self) -> tuple[list[Record], str]:
        """Return the concepts' records and the names of their files."""
        if self.concepts is not None:
            with naming("concepts"):
                return read_records(self.concepts), str(self.concepts)
        found = find_concepts(data_directory(self.data_dir))
        files = sorted({str(file) for _, file in found.values()})
        return [found[name][0] for name in sorted(found)], ", ".join(files)


def _scales(noise: str | Sequence[float]) -> list[float]:
    parts = [part for part in noise.split(",") if part.strip()] if isinstance(noise, str) else noise
    try:
        return list(dict.fromkeys(float(part) for part in parts))
    except ValueError:
        raise InputError(f"`noise` must be numbers with commas between them, such as 0,0.1,0.3, got {noise}") from None
