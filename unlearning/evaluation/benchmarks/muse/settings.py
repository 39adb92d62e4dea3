"""Settings of MUSE."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from unlearning.evaluation.benchmarks.muse import benchmark
from unlearning.evaluation.benchmarks.muse.data import read_muse
from unlearning.evaluation.harness import Prepare
from unlearning.evaluation.subject import Runtime


@dataclass(frozen=True, kw_only=True)
class MuseSettings:
    """Verbatim and knowledge memorisation, privacy leakage and utility on News or Books.

    Attributes:
        corpus: The corpus, news or books.
        auc_retain: AUC of a retrained model, for PrivLeak without a control.
        data_dir: Directory that holds muse-news/ or muse-books/; None for $DISSECT_DATA, then the hub.
        limit: Use only the first N rows of each set.
        seed: Random seed of the bootstrap.
    """

    source: ClassVar[str] = "MUSE, arXiv 2407.06460"

    corpus: str
    auc_retain: float | None = None
    data_dir: str | Path | None = None
    limit: int | None = None
    seed: int = 0

    def open(self, _runtime: Runtime) -> Prepare:
        """Read the corpus; see `Settings.open`."""
        benchmark.check_auc(self.auc_retain)
        found = read_muse(self.corpus, self.data_dir, limit=self.limit)
        return partial(benchmark.prepare, data=found, auc_retain=self.auc_retain, seed=self.seed)
