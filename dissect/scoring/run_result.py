"""What the results of all experiments have in common: they hand out copies, and are written as a run directory."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pandas as pd

from dissect.scoring.tidy import pair_title
from unlearning.common.runs import Run, open_run, read_finished, write_frame

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from dissect.plotting import Exported

T = TypeVar("T")

RESULTS = "results"
"""The table that every run has, `results.parquet`."""

_PROVENANCE = (
    *("command", "base", "unlearned", "control", "donors", "data"),
    *("strangers", "outside_parameters", "canonical_form"),
)


class Copied(Generic[T]):
    """A dataclass field that hands out a copy, so that editing what it returns changes no later number.

    The object itself is kept under the field's name with a leading underscore, for code that only reads it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        """Choose the attribute that keeps the object."""
        self._kept = f"_{name}"

    def __get__(self, instance: object | None, owner: type) -> T:
        """Return a deep copy of the object.

        Raises:
            AttributeError: The class is asked instead of an instance; dataclasses take this for "no default".
        """
        if instance is None:
            raise AttributeError(self._kept)
        kept: Any = getattr(instance, self._kept)
        return copy.deepcopy(kept)

    def __set__(self, instance: object, value: T) -> None:
        """Keep the object."""
        setattr(instance, self._kept, value)


@dataclass(eq=False, kw_only=True)
class RunResult(ABC):
    """The result of an experiment.

    Attributes:
        configuration: Everything that the numbers depend on.
        provenance: Names and paths of the models and data.
        wall_time_s: Duration of the computation in seconds.
        measured: What the run measured of itself, such as peak memory; empty in a result read from disk.
    """

    configuration: Copied[dict[str, Any]] = Copied()
    provenance: Copied[dict[str, Any]] = Copied()
    wall_time_s: float
    measured: Copied[dict[str, Any]] = Copied()

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Return the numbers that a paper quotes, as plain data."""

    @abstractmethod
    def figures(self) -> dict[str, "go.Figure"]:
        """Return the figures of the run directory by file name."""

    @abstractmethod
    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables that the figures show by file name."""

    @abstractmethod
    def _files(self) -> dict[str, pd.DataFrame]:
        """Return the tables that are written as parquet by file name, `results` among them."""

    @property
    def title(self) -> str:
        """`base → unlearned`."""
        return pair_title(self.provenance)

    def write(self, run: Run) -> None:
        """Write everything but the figures into an open run and mark the run complete.

        The result's wall time becomes that of the whole run, with the time spent before it was resumed.
        """
        spent = self.wall_time_s
        self.wall_time_s = round(run.record["wall_time_s"] + spent, 3)
        self._write_beside(run)
        run.finish(self._files()[RESULTS], self.summary(), wall_time_s=spent, measured=self.measured)

    def _write_beside(self, run: Run) -> None:
        """Write the files other than `results.parquet` and `summary.json`."""
        for name, table in self._files().items():
            if name != RESULTS:
                write_frame(run.path / f"{name}.parquet", table)

    def save(self, path: str | Path, *, formats: Sequence[str] = ("html",)) -> Path:
        """Write a run directory: tables, summary and figures.

        Args:
            path: The directory; a new one, an empty one, or one that holds this run already.
            formats: File formats of the figures: `html`, `pdf`, `svg`, `png`.

        Returns:
            The directory.

        Raises:
            InputError: The directory holds something else, or cannot be written.
        """
        run = open_run(path, self.configuration, self.provenance)
        if not run.is_complete:
            self.write(run)
        self.save_figures(run.path, formats=formats)
        return run.path

    def save_figures(self, path: Path, *, formats: Sequence[str] = ("html",)) -> "Exported":
        """Write the figures, and the tables that they show as csv, into `path/figures`.

        Args:
            path: The run directory.
            formats: File formats of the figures: `html`, `pdf`, `svg`, `png`.

        Returns:
            The paths of the written files, and the reason why an image is missing.

        Raises:
            InputError: A format is unknown, or the directory cannot be written.
        """
        from dissect.plotting import export_all

        return export_all(path, self.figures(), self.tables(), formats=formats)


def read_result(path: Path, *commands: str, renamed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read what every result has from a finished run directory.

    Args:
        path: The run directory.
        commands: The commands that may have written it.
        renamed: New names by the names that earlier versions wrote, of keys and of entries of lists.

    Returns:
        The arguments of `RunResult`.

    Raises:
        InputError: The directory holds no run, the run of another command, or an unfinished one.
    """
    record = {(renamed or {}).get(name, name): value for name, value in read_finished(path, *commands).items()}
    return {
        "configuration": _with_new_names(record["configuration"], renamed or {}),
        "provenance": _with_new_names({name: record[name] for name in _PROVENANCE if name in record}, renamed or {}),
        "wall_time_s": record["wall_time_s"],
        "measured": {},
    }


def _with_new_names(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _with_new_names(item, names) for key, item in value.items()}
    return (
        [names.get(item, item) if isinstance(item, str) else item for item in value]
        if isinstance(value, list)
        else value
    )
