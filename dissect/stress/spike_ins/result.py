"""The result of spike-ins: as a table, in sentences, and on disk."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from dissect.scoring.run_result import Copied
from dissect.stress.spike_ins.scale import COLUMNS, Scale, scale_of, sentence

PEOPLE = ("facts", "name", "prompt", "answer")
"""Columns of `SpikeIns.people`."""

STAGES = ("stage", "steps", "known", "probability", "rank")
"""Columns of `SpikeIns.stages`."""


@dataclass(eq=False, kw_only=True)
class SpikeIns:
    """What attacks find of invented people in the user's own model, and of the user's facts.

    Attributes:
        frame: One row per attack, set of facts (`hidden`, `never shown`, `forget`: the user's), attacked model
            (`model`, or its `copy` with planted people), stage (`before` the attack or `attacked`), measure and
            example, with the columns `COLUMNS`.
        stages: How teaching and hiding went (see `Spiked`).
        people: The invented people's `facts` (their set), `name`, `prompt` and `answer`.
        settings: Everything that the numbers depend on besides models and facts.
        seconds: Wall time in seconds.
        seed: Random seed of the bootstrap draws.
        reason: Why the spike-ins failed; an empty string if they did not.
    """

    frame: Copied[pd.DataFrame] = Copied()
    stages: Copied[pd.DataFrame] = Copied()
    people: Copied[pd.DataFrame] = Copied()
    settings: Copied[dict[str, Any]] = Copied()
    seconds: float
    seed: int = 0
    reason: str = ""

    @property
    def n(self) -> int:
        """Number of invented people."""
        return int(self.settings["n"])

    def scales(self) -> list[Scale]:
        """Return the scale of every attack, in the order in which they ran; none if the spike-ins failed."""
        frame = self.frame
        return [scale_of(str(attack), rows, self.seed) for attack, rows in frame.groupby("attack", sort=False)]

    def table(self) -> pd.DataFrame:
        """Return one row per attack and number: `attack`, `number`, `value`, `low`, `high`, `n`."""
        rows = []
        for scale in self.scales():
            for name in ("zero", "ceiling", "user", "score", "moved"):
                estimate = getattr(scale, name)
                if estimate is not None:
                    rows.append({"attack": scale.attack, "number": name, **asdict(estimate)})
            power = {"value": scale.power, "low": np.nan, "high": np.nan, "n": scale.ceiling.n}
            rows.append({"attack": scale.attack, "number": "power", **power})
        return pd.DataFrame(rows, columns=["attack", "number", "value", "low", "high", "n"])

    def sentences(self) -> list[str]:
        """Return what the spike-ins say: one string per attack, or why they failed."""
        return [self.reason] if self.reason else [sentence(scale) for scale in self.scales()]

    def summary(self) -> dict[str, Any]:
        """Return the numbers and sentences, as plain data for JSON."""
        numbers = self.table().astype(object)
        return {
            "n": self.n,
            "failed": self.reason or None,
            "sentences": self.sentences(),
            "numbers": numbers.where(numbers.notna(), None).to_dict("records"),
            "stages": self.stages.to_dict("records"),
            "seconds": self.seconds,
        }

    def parts(self) -> dict[str, pd.DataFrame]:
        """Return the tables by the names of their files in a run directory."""
        return {"spike_ins": self.frame, "spike_ins--stages": self.stages, "spike_ins--people": self.people}

    def record(self) -> dict[str, Any]:
        """Return everything but the tables, as plain data for JSON."""
        return {"settings": self.settings, "seconds": self.seconds, "seed": self.seed, "reason": self.reason}

    @classmethod
    def failed(cls, reason: str, *, n: int, seed: int = 0) -> "SpikeIns":
        """Return spike-ins that were not begun, with the reason."""
        tables = {"frame": COLUMNS, "stages": STAGES, "people": PEOPLE}
        empty = {name: pd.DataFrame(columns=list(columns)) for name, columns in tables.items()}
        return cls(**empty, settings={"n": n}, seconds=0.0, seed=seed, reason=reason)

    @classmethod
    def from_parts(cls, record: Mapping[str, Any], parts: Mapping[str, pd.DataFrame]) -> "SpikeIns":
        """Put spike-ins together from what `record` and `parts` gave."""
        return cls(
            frame=parts["spike_ins"], stages=parts["spike_ins--stages"], people=parts["spike_ins--people"], **record
        )
