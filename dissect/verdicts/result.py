"""The result of `verdict`: the label and everything that it rests on; as a table, as JSON, and on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dissect.scoring.run_result import RESULTS, Copied, RunResult, read_result
from dissect.stress.core.result import EVIDENCE_LEVELS, Residual, StressResult
from dissect.stress.core.storage import as_record, current_test, from_parts, one_table
from dissect.stress.spike_ins.result import SpikeIns
from dissect.verdicts import sentences as wording
from dissect.verdicts.attacks import attack_table, remarks
from dissect.verdicts.facts import QUESTIONS, counts, fact_table
from dissect.verdicts.rule import Label, Rule, RuleEntry, Score, Utility, judge, read_rule, residuals_of
from dissect.verdicts.signs import Signs
from dissect.verdicts.spiked import keep_spike_ins, read_spike_ins
from dissect.verdicts.spread import RunSpread
from unlearning.common.runs import Run, read_finished, read_frame, write_bytes, write_json

COMMAND = "verdict"

FACTS = "facts"
"""The table of facts in a run directory, `facts.parquet`."""

_RENAMED = {
    "never": "control",
    "never_sha256": "control_sha256",
    "benign_sha256": "general_sha256",
    "expressed": "without_attack",
}
"""Current names of keys and tests by their names in runs of earlier versions."""


@dataclass(eq=False, kw_only=True)
class Verdict(RunResult):
    """The label, and what it rests on.

    Attributes:
        label: `not unlearned`, `suppressed`, `erased` or `inconclusive`.
        score: Residual knowledge with its interval.
        utility: How much of the retained knowledge is left; None without retain questions.
        signs: What decides about *erased* beside the score; None in runs of earlier versions.
        results: The result of every stress test that was run; `without_attack` comes first.
        not_run: Reasons why tests of the budget were not run, by test.
        rule: The rule that was applied.
        needed: How many people, facts or controls it would take to call a model without the knowledge erased
            (`dissect.verdicts.planning`); None if the label is not *inconclusive* or no plan can be made.
        questions: The forget facts with the columns `id`, `group`, `question` and `answer`; question and answer are
            None in runs of earlier versions.
        base_and_control_s: Wall seconds spent on base and control in tests whose values `shared` keeps for the next
            unlearned model; None in runs of earlier versions.
        spike_ins: What the attacks find of invented people in this very model; None without `spike_ins`.
    """

    label: Label
    score: Score
    utility: Utility | None
    signs: Signs | None
    results: Copied[Sequence[StressResult]] = Copied()
    not_run: Copied[Mapping[str, str]] = Copied()
    rule: Rule
    needed: str | None = None
    questions: Copied[pd.DataFrame] = Copied()
    base_and_control_s: float | None = None
    spike_ins: SpikeIns | None = None
    _results: Sequence[StressResult] = field(init=False, repr=False)
    _not_run: Mapping[str, str] = field(init=False, repr=False)
    _questions: pd.DataFrame = field(init=False, repr=False)

    @property
    def word(self) -> Label:
        """The label, by its name in earlier versions."""
        return self.label

    @property
    def has_control(self) -> bool:
        """Whether residuals are relative to a control; else to chance."""
        return self.configuration["control_sha256"] is not None

    @property
    def residuals(self) -> dict[str, Residual]:
        """The residual of every test, and of every entry of the rule that names a measure, by `TEST` or `TEST:MEASURE`.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.residuals["relearn_disjoint"].variant  # doctest: +SKIP
            'lr 0.001'
        """
        return residuals_of(self._results, self.rule)

    def evidence(self) -> pd.DataFrame:
        """Return the residual of every test, ordered by evidence level.

        Returns:
            One row per test with the columns `level` and `claim` (evidence level and what it says), `test`, `measure`,
            `rho` with its interval `low`, `high` (None if not defined), `n` facts, `variant` (the strongest one),
            `against` (`control` or `floor`), `counts` (whether the rule uses the test), `seconds`, `reason` (why rho
            is not defined) and `proves` (what the test can and cannot show).

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.evidence()[["level", "test", "rho", "low", "high"]].iloc[0]["test"]  # doctest: +SKIP
            'without_attack'
        """
        counted = {entry.test for entry in self.rule.tests}
        rows = []
        for result in self._results:
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
                    "counts": result.test in counted,
                    "seconds": result.seconds,
                    "reason": found.reason,
                    "proves": result.proves,
                }
            )
        return pd.DataFrame(rows).sort_values("level", kind="stable", ignore_index=True)

    def attacks(self) -> pd.DataFrame:
        """Return how every variant of every attack went: whether it took hold, and by what.

        Returns:
            A table with the columns of `dissect.verdicts.attacks.attack_table`: one row per test, variant and role.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.attacks().query("not took_hold")[["test", "variant", "reason"]]  # doctest: +SKIP
        """
        return attack_table(self._results)

    def facts(self) -> pd.DataFrame:
        """Return one row per fact: which came back under the strongest attack, and what the models say.

        Returns:
            A table with the columns of `dissect.verdicts.facts.fact_table`, among them `question`, `answer`, `p`, `q`,
            `came_back`, `attack`, `variant`, and the greedy answers `text_base`, `text_unlearned`, `text_attacked` and
            `text_control`. p and q are NaN for a fact that has too few distractors, and in runs of earlier versions.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.facts().query("came_back")[["question", "text_attacked"]]  # doctest: +SKIP
        """
        return fact_table(self._results, self.residuals, self.rule, self._questions)

    @property
    def findings(self) -> wording.Findings:
        """What the sentences, the page and the printed tables are made from."""
        return wording.Findings(
            label=self.label,
            score=self.score,
            utility=self.utility,
            signs=self.signs,
            rule=self.rule,
            evidence=self.evidence(),
            has_control=self.has_control,
            not_run=self.not_run,
            decisive=self._decisive(),
            facts=self.facts(),
            attacks=self.attacks(),
            needed=self.needed,
            budget=self.configuration["budget"],
            outside=tuple(self.provenance.get("outside_parameters", ())),
            strangers=tuple(self.provenance.get("strangers", ())),
        )

    def _decisive(self) -> list[str]:
        """Return the tests of the rule without any one of which the label would change."""
        share = self.utility.share if self.utility else None
        # A run of an earlier version is judged again, because its label is that of an earlier rule.
        label, _, _ = judge(self._results, self.rule, utility=share)
        changed = []
        for name in dict.fromkeys(entry.test for entry in self.score.used):
            rest = [result for result in self._results if result.test != name]
            if judge(rest, self.rule, utility=share)[0] != label:
                changed.append(name)
        return changed

    def sentences(self) -> list[str]:
        """Return the result in sentences, the most important first.

        Returns:
            One string per sentence.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.sentences()[0]  # doctest: +SKIP
            'The model no longer gives the answers, but the tests recover knowledge of them from it.'
        """
        return wording.sentences(self.findings)

    def advice(self) -> list[str]:
        """Return sentences that say what would change the label, or make it firmer.

        Returns:
            One string per sentence; empty if there is no advice.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.advice()[0]  # doctest: +SKIP
            'The label rests on relearn_disjoint alone; without it the label would change.'
        """
        return wording.advice(self.findings)

    def page(self) -> str:
        """Return the verdict as one HTML page that can be read on its own.

        Returns:
            The HTML document, which needs no network.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.page().startswith("<!doctype html>")  # doctest: +SKIP
            True
        """
        from dissect.verdicts.page import Subject, page

        names = self.provenance
        subject = Subject(
            base=names["base"],
            unlearned=names["unlearned"],
            control=names.get("control"),
            n_facts=self.configuration["n_facts"],
            wall_time_s=self.wall_time_s,
        )
        return page(self.findings, subject, title=self.title, spike_ins=self.spike_ins)

    def figure(self) -> Any:
        """Return the residual of every test with its interval as a plotly figure.

        Returns:
            One dot per test.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.figure().write_html("evidence.html")  # doctest: +SKIP
        """
        from dissect.verdicts.figures import evidence_figure

        return evidence_figure(self.evidence(), title=self.title)

    def figures(self) -> dict[str, Any]:
        """Return the figures of the run directory by file name: `evidence`, `standing` and, if any, `spike_ins`."""
        from dissect.stress.spike_ins.figures import spike_ins_figure
        from dissect.verdicts.figures import standing_figure

        scales = self.spike_ins.scales() if self.spike_ins else []
        standing = standing_figure(self.score, self.rule, label="this model")
        found = {"evidence": self.figure(), "standing": standing}
        return found | ({"spike_ins": spike_ins_figure(scales)} if scales else {})

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the tables that the figures show by file name: `evidence` and, if there are any, `spike_ins`."""
        found = {"evidence": self.evidence()}
        return found | ({"spike_ins": self.spike_ins.table()} if self.spike_ins and not self.spike_ins.reason else {})

    @property
    def title(self) -> str:
        """`base → unlearned: label`."""
        return f"{super().title}: {self.label}"

    def summary(self) -> dict[str, Any]:
        """Return the content of `verdict.json`: label, score, utility, evidence and sentences, as plain data.

        Returns:
            A dictionary that JSON takes.

        Examples:
            >>> from dissect import load_verdict
            >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
            >>> found.summary()["verdict"]  # doctest: +SKIP
            'suppressed'
        """
        found = self.findings
        evidence = found.evidence
        return {
            "verdict": self.label,
            "residual_knowledge": {
                "score": self.score.value,
                "low": self.score.low,
                "high": self.score.high,
                "tests": list(map(str, self.score.used)),
                "missing": list(map(str, self.score.missing)),
            },
            "run_spread": None if self.score.spread is None else vars(self.score.spread),
            "signs": None if self.signs is None else vars(self.signs),
            "utility": None if self.utility is None else vars(self.utility),
            "against": "control" if self.has_control else "floor",
            "sentences": wording.sentences(found),
            "facts": counts(found.facts),
            "attacks": _records(found.attacks),
            "remarks": remarks(found.attacks, evidence),
            "evidence": _records(evidence),
            "needed": self.needed,
            "spike_ins": None if self.spike_ins is None else self.spike_ins.summary(),
            "not_run": dict(self._not_run),
            "advice": wording.advice(found),
            "rule": {name: value for name, value in self.rule.record().items() if name not in ("needed", "reference")},
            "budget": found.budget,
            "wall_time_s": self.wall_time_s,
            "base_and_control_s": self.base_and_control_s,
        }

    def _files(self) -> dict[str, pd.DataFrame]:
        """Return the rows of all tests, and the tests' further tables."""
        further = {
            f"tables/{result.test}--{name}": table for result in self._results for name, table in result.tables.items()
        }
        return {RESULTS: one_table(self._results), FACTS: self.facts(), **further}

    def _write_beside(self, run: Run) -> None:
        """Write the further tables, `verdict.json`, `verdict.html`, and what `load_verdict` reads from the record."""
        super()._write_beside(run)
        if self.spike_ins is not None:
            keep_spike_ins(run, self.spike_ins)
        write_json(run.path / "verdict.json", self.summary())
        write_bytes(run.path / "verdict.html", self.page().encode())
        entries = {name: list(map(str, getattr(self.score, name))) for name in ("used", "missing")}
        run.note(
            tests=[as_record(result) for result in self._results],
            verdict={
                "label": self.label,
                "score": vars(self.score) | entries | {"spread": self.score.spread and vars(self.score.spread)},
                "signs": None if self.signs is None else vars(self.signs),
                "utility": None if self.utility is None else vars(self.utility),
                "needed": self.needed,
                "base_and_control_s": self.base_and_control_s,
                "not_run": dict(self._not_run),
                "rule": self.rule.record(),
            },
        )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as plain data, with None for what is not there."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _read_questions(path: Path, results: Sequence[StressResult]) -> pd.DataFrame:
    """Read the facts that the run directory holds; runs of earlier versions have only their names and groups."""
    if (path / f"{FACTS}.parquet").exists():
        return read_frame(path / f"{FACTS}.parquet")[list(QUESTIONS)].astype(object)
    frame = results[0].frame.drop_duplicates("example_index").sort_values("example_index")
    named = frame[["example", "group"]].rename(columns={"example": "id"}).reset_index(drop=True)
    return named.assign(question=None, answer=None)


def load_verdict(path: str | Path) -> Verdict:
    """Load the verdict of a finished run, of this or an earlier version.

    Args:
        path: The run directory that `verdict(..., out=path)`, `Verdict.save` or `dissect verdict` wrote.

    Returns:
        The verdict.

    Raises:
        InputError: The directory holds no finished run of `dissect verdict`, or its files cannot be read.

    Examples:
        >>> from dissect import load_verdict
        >>> found = load_verdict("runs/verdict-npo")  # doctest: +SKIP
        >>> found.label  # doctest: +SKIP
        'suppressed'
    """
    path = Path(path)
    record = read_finished(path, COMMAND)
    frame = read_frame(path / f"{RESULTS}.parquet")
    found = record["verdict"]
    results = []
    for of_test in record["tests"]:
        own = frame[frame["test"] == of_test["test"]].drop(columns=["test", "level", "rung"], errors="ignore")
        names = [f"{of_test['test']}--{name}" for name in of_test["tables"]]
        tables = {name: read_frame(path / "tables" / f"{name}.parquet") for name in names}
        results.append(from_parts(of_test, {of_test["test"]: own.reset_index(drop=True), **tables}))
    entries = {name: tuple(map(RuleEntry.parse, found["score"][name])) for name in ("used", "missing")}
    # Runs of earlier versions have no spread and no signs.
    spread, signs = found["score"].get("spread"), found.get("signs")
    return Verdict(
        label=found["label"] if "label" in found else found["word"],
        score=Score(**found["score"] | entries | {"spread": RunSpread(**spread) if spread else None}),
        signs=Signs(**signs | {"attacks": tuple(signs["attacks"])}) if signs else None,
        utility=None if found["utility"] is None else Utility(**found["utility"]),
        results=results,
        not_run={current_test(name): reason for name, reason in found["not_run"].items()},
        rule=read_rule(found["rule"]),
        needed=found.get("needed"),
        base_and_control_s=found.get("base_and_control_s"),
        questions=_read_questions(path, results),
        spike_ins=read_spike_ins(path, record),
        **read_result(path, COMMAND, renamed=_RENAMED),
    )
