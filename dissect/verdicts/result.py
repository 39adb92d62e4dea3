"""A verdict with all that it rests on; as a table, as JSON, and on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dissect.scoring.run_result import RESULTS, RunResult
from dissect.stress.core.result import EVIDENCE_LEVELS, Residual, StressResult
from dissect.stress.core.storage import as_record, from_parts, one_table
from dissect.verdicts.rule import Rule, Score, Word, read_rule, residuals_of, test_of
from unlearning.common.runs import Run, read_finished, read_frame

COMMAND = "verdict"


@dataclass(frozen=True)
class Utility:
    """What is left of the knowledge that was to stay.

    Attributes:
        share: of the base's right answers to retain questions, teacher-forced, that the unlearned model gives too.
        n: questions that the base answers.
        collapsed: whether it is less than the rule asks for.
    """

    share: float
    n: int
    collapsed: bool


@dataclass(eq=False, kw_only=True)
class Verdict(RunResult):
    """The answer, and what it rests on.

    Attributes:
        word: `not unlearned`, `suppressed`, `erased` or `inconclusive`.
        score: residual knowledge with its interval.
        utility: None where no retain questions were asked.
        results: every stress test that was run, the unattacked answers (`expressed`) first.
        not_run: tests of the budget that could not be run, with the reason.
        guessing: `dissect.stress.core.lexical_overlap` of the forget facts where there is no never model; else None.
        rule: the frozen numbers.
    """

    word: Word
    score: Score
    utility: Utility | None
    results: Sequence[StressResult]
    not_run: Mapping[str, str]
    guessing: Mapping[str, float] | None
    rule: Rule

    @property
    def residuals(self) -> dict[str, Residual]:
        """The residual of every test by its name, and of every entry of the rule that names a measure."""
        return residuals_of(self.results, self.rule)

    def evidence(self) -> pd.DataFrame:
        """One row a test, up the claim ladder: `rung`, `claim`, `test`, `measure`, `rho`, `low`, `high`, `n`, `variant`
        (the strongest), `against` (`never` or `floor`), `counts` (in the rule), `seconds`, `reason` (why there is no
        rho) and `proves`."""
        rows = []
        for result in self.results:
            found = result.residual()
            rows.append(
                {
                    "level": result.level,
                    "claim": EVIDENCE_LEVELS[result.level],
                    "test": result.test,
                    "measure": result.measure,
                    "rho": found.rho,
                    "low": found.low,
                    "high": found.high,
                    "n": found.n,
                    "variant": found.variant,
                    "against": found.against,
                    "counts": result.test in map(test_of, self.rule.tests),
                    "seconds": result.seconds,
                    "reason": found.reason,
                    "proves": result.proves,
                }
            )
        return pd.DataFrame(rows).sort_values("level", kind="stable", ignore_index=True)

    def figure(self) -> Any:
        """The residual of every test with its interval, a plotly figure."""
        from dissect.verdicts.figures import evidence_figure

        return evidence_figure(self.evidence(), title=self.title)

    @property
    def nothing(self) -> str:
        """What residuals are compared with: a residual of 0, for a reader."""
        return "a model that never knew" if self.configuration["control_sha256"] else "guessing"

    @property
    def title(self) -> str:
        """`base → unlearned: word`."""
        from dissect.scoring.tidy import pair_title

        return f"{pair_title(self.provenance)}: {self.word}"

    def summary(self) -> dict[str, Any]:
        """What `verdict.json` holds."""
        from dissect.verdicts.sentences import advice, sentences

        evidence = self.evidence()
        return {
            "verdict": self.word,
            "residual_knowledge": {
                "score": self.score.value,
                "low": self.score.low,
                "high": self.score.high,
                "tests": list(self.score.used),
                "missing": list(self.score.missing),
            },
            "utility": None if self.utility is None else vars(self.utility),
            "against": "control" if self.configuration["control_sha256"] else "floor",
            "guessing": None if self.guessing is None else dict(self.guessing),
            "said": sentences(self),
            "evidence": evidence.astype(object).where(evidence.notna(), None).to_dict("records"),
            "not_run": dict(self.not_run),
            "would_change": advice(self),
            "rule": {
                "tests": list(self.rule.tests),
                "nothing": self.rule.nothing,
                "everything": self.rule.everything,
                "spread": self.rule.spread,
                "not_unlearned_above": self.rule.not_unlearned_above,
                "suppressed_above": self.rule.suppressed_above,
                "erased_below": self.rule.erased_below,
                "utility_floor": self.rule.utility_floor,
                "fitted": dict(self.rule.fitted),
            },
            "budget": self.configuration["budget"],
            "wall_time_s": self.wall_time_s,
        }

    def _write_beside(self, run: Run) -> None:
        """Write the tests' tables, `verdict.json`, `verdict.html`, and what `load_verdict` reads from the record."""
        from dissect.verdicts.page import write_page
        from unlearning.common.runs import write_json

        super()._write_beside(run)
        write_json(run.path / "verdict.json", self.summary())
        write_page(self, run.path / "verdict.html")
        run.note(
            tests=[as_record(result) for result in self.results],
            verdict={
                "word": self.word,
                "score": vars(self.score) | {"used": list(self.score.used), "missing": list(self.score.missing)},
                "utility": None if self.utility is None else vars(self.utility),
                "not_run": dict(self.not_run),
                "guessing": None if self.guessing is None else dict(self.guessing),
                "rule": {name: getattr(self.rule, name) for name in Rule.__dataclass_fields__},
            },
        )

    def figures(self) -> dict[str, Any]:
        """Return the figures of the run directory: `evidence` and `standing`."""
        from dissect.verdicts.figures import standing_figure

        return {"evidence": self.figure(), "standing": standing_figure(self.score, self.rule, label="this model")}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the table that the figures show, `evidence`."""
        return {"evidence": self.evidence()}

    def _files(self) -> dict[str, pd.DataFrame]:
        beside = {
            f"tables/{result.test}--{name}": table for result in self.results for name, table in result.tables.items()
        }
        return {RESULTS: one_table(self.results)} | beside


def load_verdict(path: str | Path) -> Verdict:
    """The verdict of a finished run.

    Raises:
        InputError: no finished run of `dissect verdict` is there.
    """
    path = Path(path)
    record = read_finished(path, COMMAND)
    frame = read_frame(path / "results.parquet")
    said = record["verdict"]
    results = []
    for of_test in record["tests"]:
        own = frame[frame["test"] == of_test["test"]].drop(columns=["test", "level", "rung"], errors="ignore")
        own = own.reset_index(drop=True)
        names = [f"{of_test['test']}--{name}" for name in of_test["tables"]]
        tables = {name: read_frame(path / "tables" / f"{name}.parquet") for name in names}
        results.append(from_parts(of_test, {of_test["test"]: own, **tables}))
    score = said["score"] | {name: tuple(said["score"][name]) for name in ("used", "missing")}
    kept = ("base", "unlearned", "control", "data")
    return Verdict(
        word=said["word"],
        score=Score(**score),
        utility=None if said["utility"] is None else Utility(**said["utility"]),
        results=results,
        not_run=said["not_run"],
        guessing=said.get("guessing"),  # runs of before it was asked have none
        rule=read_rule(said["rule"]),
        configuration=_current(record["configuration"]),
        provenance={name: _current(record).get(name) for name in kept},
        wall_time_s=record["wall_time_s"],
        measured={},
    )


def _current(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of this or an earlier version with the current names of its keys."""
    old = {"never": "control", "never_sha256": "control_sha256"}
    return {old.get(name, name): value for name, value in record.items()}
