"""The findings of all pairs as one tidy table, as text for a reader, and averaged as the paper does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from dissect import BehaviourResult, DecompositionResult, ProbeResult, SweepResult


_WIDTH = "5"
_PLACE = ["arm", "target", "donor", "site", "window", "centre", "first_layer", "last_layer"]


def findings_table(findings: Sequence["Findings"]) -> pd.DataFrame:
    """Collect every number that a reader is shown.

    Args:
        findings: The experiments of each pair.

    Returns:
        Columns `pair`, `family`, `method`, `concept`, `seed`, `experiment`, `quantity`, `of` (site, term or set of
        prompts), `layers`, `value`, `low`, `high`.
    """
    rows = []
    for one in findings:
        keys: dict[str, Any] = {"pair": one.pair.name, "family": one.pair.family, "method": one.pair.method}
        keys |= {"concept": one.pair.concept, "seed": one.pair.seed}
        rows += [keys | row for make in (_sweeps, _decomposition, _coefficients, _behaviour) for row in make(one)]
    return pd.DataFrame(rows)


def _sweeps(one: "Findings") -> Iterator[dict[str, Any]]:
    for experiment, result in (("patch", one.patched), ("restore", one.restored)):
        for _, row in result.peaks().iterrows():
            if row["window"] != _WIDTH:
                continue
            at_peak = f"{row['first_layer']}-{row['last_layer']}"
            for layers, numbers in ((at_peak, dict(row)), ("all", _whole_model(result, row["site"]))):
                for quantity in ("krs", "control_krs", "difference", "null_krs", "minus_null"):
                    if quantity in numbers:
                        yield _found(experiment, quantity, row["site"], layers, numbers, quantity)


def _whole_model(result: Any, site: str) -> dict[str, Any]:
    """Return the row of all layers at once: the suffix that begins with the first layer."""
    from dissect.sweeps.result import column_name, difference_name

    def here(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["site"] == site) & (table["window"] == "suffix") & (table["first_layer"] == 0)]

    row: dict[str, Any] = {}
    for table, value, name_of in (
        (result.curve(), "krs", lambda arm: "krs" if arm == "main" else f"{column_name(arm)}_krs"),
        (result.contrast(), "difference", difference_name),
    ):
        for _, cell in here(table).iterrows():
            row |= {f"{name_of(cell['arm'])}{end}": cell[f"{value}{end}"] for end in ("", "_low", "_high")}
    return row


def _decomposition(one: "Findings") -> Iterator[dict[str, Any]]:
    n_layers = int(one.decomposed.curve()["last_layer"].max()) + 1

    def whole(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["first_layer"] == 0) & (table["last_layer"] == n_layers - 1) & (table["site"] == "mlp_out")]

    curve = whole(one.decomposed.curve())
    for _, row in curve[curve["arm"] == "main"].iterrows():
        yield _found("decompose", "krs", row["term"], "all", row, "krs")
        yield _found("decompose", "share", row["term"], "all", row, "share")
    for _, row in whole(one.decomposed.contrast()).iterrows():
        name = "difference" if row["against"] == "control" else f"minus_{row['against']}"
        yield _found("decompose", name, row["term"], "all", row, "krs")
        yield _found("decompose", f"share_{name}", row["term"], "all", row, "share")


def _coefficients(one: "Findings") -> Iterator[dict[str, Any]]:
    curve, selectivity = one.probed.layer_curve(), one.probed.selectivity()
    last = int(curve["layer"].max())
    shares = one.probed.shares()
    for target in one.probed.targets:
        prefix = "" if target == "unlearned" else f"{target}_"
        for _, row in curve[(curve["target"] == target) & (curve["layer"] == last)].iterrows():
            yield _found("probe", f"{prefix}relative_change", row["prompts"], str(last), row, "relative_change")
        for _, row in selectivity[(selectivity["target"] == target) & (selectivity["layer"] == last)].iterrows():
            yield _found("probe", f"{prefix}selectivity", "forget / retain", str(last), row, "selectivity")
        for _, row in shares[(shares["target"] == target) & (shares["last_layers"] == 1)].iterrows():
            yield _found("probe", f"{prefix}share_of_change", row["prompts"], str(last), row, "share")
        half = one.probed.half()
        for _, row in half[half["target"] == target].iterrows():
            of = {"top": "most changed", "matched": "norm-matched"}.get(row["selection"], row["selection"])
            yield _found("probe", f"{prefix}neurons_for_half", of, "all", row, "k_half")


def _behaviour(one: "Findings") -> Iterator[dict[str, Any]]:
    means = one.behaved.means()
    for _, row in means[means["metric"].isin(["bleu", "rouge_l", "kl", "exact_match", "probability"])].iterrows():
        prefix = "" if row["model"] == "unlearned" else f"{row['model']}_"
        yield {
            **{"experiment": "behave", "quantity": f"{prefix}{row['metric']}", "of": row["set"], "layers": ""},
            **{name: row[name] for name in ("value", "low", "high")},
        }
    for _, row in one.behaved.beyond_control().iterrows():
        yield _found("behave", f"{row['metric']}_beyond_control", row["set"], "", row, "difference")


def _found(experiment: str, quantity: str, of: str, layers: str, row: Any, name: str) -> dict[str, Any]:
    values = {"value": row[name], "low": row.get(f"{name}_low"), "high": row.get(f"{name}_high")}
    return {"experiment": experiment, "quantity": quantity, "of": of, "layers": layers, **values}


def paper_average(findings: Sequence["Findings"]) -> pd.DataFrame:
    """Average KRS by arm, site and window as the paper does: over questions, then seeds, concepts, and last methods.

    There is no interval: the paper's average has none.

    Args:
        findings: The experiments of each pair.

    Returns:
        The columns of `SweepResult.curve` that `comparison_figure` reads, for the paper's width only, and `family`; `n`
        is the number of runs in a mean.
    """
    curves = [
        result.curve().assign(family=one.pair.family, method=one.pair.method, concept=one.pair.concept)
        for one in findings
        for result in (one.patched, one.restored)
    ]
    runs = pd.concat(curves, ignore_index=True)
    runs = runs[runs["window"] == _WIDTH]
    keys = ["family", *_PLACE]
    n = runs.groupby(keys, sort=False)["krs"].count()
    mean = runs.groupby([*keys, "method", "concept"], sort=False)["krs"].mean()
    mean = mean.groupby([*keys, "method"], sort=False).mean().groupby(keys, sort=False).mean()
    return mean.reset_index().assign(krs_low=float("nan"), krs_high=float("nan"), n=n.to_numpy())


def markdown(table: pd.DataFrame) -> str:
    """Write two tables as Markdown: recovery and its difference from the controls, and everything else."""
    return "\n".join([*_recovery(table), "", *_everything_else(table), ""])


def _recovery(table: pd.DataFrame) -> Iterator[str]:
    quantities = ["krs", "control_krs", "difference", "null_krs", "minus_null"]
    yield "| pair | restored | layers | KRS | control | KRS − control | random update | KRS − random |"
    yield "|---|---|---|---|---|---|---|---|"
    swept = table[table["experiment"].isin(["patch", "restore"])]
    for (pair, of, layers), cell in swept.groupby(["pair", "of", "layers"], sort=False):
        found = {row["quantity"]: row for _, row in cell.iterrows()}
        cells = [_number(found[name]) if name in found else "" for name in quantities]
        yield f"| {pair} | `{of}` | {layers} | {' | '.join(cells)} |"


def _everything_else(table: pd.DataFrame) -> Iterator[str]:
    def of(experiment: str, quantity: str, what: str) -> Callable[[pd.DataFrame], str]:
        def cell(rows: pd.DataFrame) -> str:
            found = rows[(rows["experiment"] == experiment) & (rows["quantity"] == quantity) & (rows["of"] == what)]
            return _number(found.iloc[0]) if len(found) else ""

        return cell

    half = "neurons_for_half", "most changed"
    columns: dict[str, Callable[[pd.DataFrame], str]] = {
        "MLP weight term, KRS − control": of("decompose", "difference", "weight"),
        "MLP coefficient term, KRS − control": of("decompose", "difference", "coefficient"),
        "last layer's change, forget / retain": of("probe", "selectivity", "forget / retain"),
        "the same in the control": of("probe", "control_selectivity", "forget / retain"),
        "neurons for half of the recovery": of("probe", *half),
        "in the control": of("probe", f"control_{half[0]}", half[1]),
        "ROUGE-L with the base, forget": of("behave", "rouge_l", "forget"),
        "retain": of("behave", "rouge_l", "retain"),
        "KL on retain beyond the control, nats": of("behave", "kl_beyond_control", "retain"),
    }
    yield f"| pair | {' | '.join(columns)} |"
    yield "|---|" + "---|" * len(columns)
    for pair, rows in table.groupby("pair", sort=False):
        yield f"| {pair} | {' | '.join(cell(rows) for cell in columns.values())} |"


def _number(row: Any) -> str:
    """Format a value with its interval, such as `0.83 [0.81, 0.84]`; a count is whole."""
    value, low, high = row["value"], row["low"], row["high"]
    if pd.isna(value):
        return "none"
    if row["quantity"].endswith("neurons_for_half"):
        return f"{value:.0f}"
    if pd.isna(low):
        return f"{value:.2f}"
    digits = 3 if max(abs(value), abs(high)) < 0.1 and row["quantity"].startswith("kl") else 2
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@dataclass(frozen=True)
class PairOf:
    """One pair of models, and how its results are grouped.

    Attributes:
        name: Name of its directory and of its rows.
        family: Models of one architecture and depth, over which results may be averaged.
        method: Unlearning method.
        concept: What was unlearned.
        seed: Number of the repetition.
        base: Name or directory of the base model.
        unlearned: Name or directory of the unlearned model.
        control: Name or directory of the control, or None.
        forget: File of forget prompts.
        retain: File of retain prompts.
    """

    name: str
    family: str
    method: str
    concept: str
    seed: int
    base: str
    unlearned: str
    control: str | None
    forget: str
    retain: str


@dataclass(frozen=True, eq=False)
class Findings:
    """All experiments on one pair."""

    pair: PairOf
    patched: "SweepResult"
    restored: "SweepResult"
    decomposed: "DecompositionResult"
    probed: "ProbeResult"
    behaved: "BehaviourResult"
