"""How each attack went: what the base kept, whether the training losses fell, what utility was left, what was tried."""

from collections.abc import Iterable

import pandas as pd

from dissect.stress.core.result import PLAIN, StressResult
from dissect.stress.core.validity import IS_USEFUL, TABLE, invalid_variants, kept_by_base

COLUMNS = (
    "test",
    "variant",
    "took_hold",
    "reason",
    "role",
    "rank",
    "kept",
    "loss_before",
    "loss_after",
    "utility",
    "costs_utility",
)
"""Columns of the table of attacks."""

LITTLE = 0.5
"""An attack that took hold is warned of if it leaves less than this share of the retain questions that the base or the
unlearned model answered, or of the base's knowledge.

Below one half an attack destroys more than it leaves. So what it does not find in the unlearned model may have been
destroyed by the attack itself. Still it counts: models that it recovers much from lose as much utility under it. Below
`USEFUL` and `KEPT` of `dissect.stress.core.validity`, it does not count at all. Utility is not warned of under attacks
that teach false answers, which costs it in every model (.13 of it is left in the base, which keeps .72 of its
knowledge, under deranged relearning of the calibration family `llama`, seed 3).
"""

_NAMES = {"base": "base", "unlearned": "unlearned model"}
"""Roles whose utility is warned of, as they are called in a sentence."""


def attack_table(results: Iterable[StressResult]) -> pd.DataFrame:
    """Return how every variant of every attack went.

    Args:
        results: Results of all tests; those without values of the base under a variant cannot be checked and are left
            out.

    Returns:
        One row per test, variant and role with the columns `COLUMNS`: `took_hold` and `reason` (why not) of the
        variant, `rank` (mean rank of the right answers of the model under it), `kept` (share of its knowledge that the
        base keeps under it), and for attacks by training `loss_before` and `loss_after` (of the taught texts, nats per
        token) and `utility` (share of the retain questions answered before that are still answered); NaN where they
        were not measured; `costs_utility`, whether the attack teaches false answers.
    """
    tables = [_of_test(result) for result in results]
    known = [table for table in tables if len(table)]
    return pd.concat(known, ignore_index=True) if known else pd.DataFrame(columns=list(COLUMNS))


def tried(attacks: pd.DataFrame) -> dict[str, str]:
    """Return which strengths every attack by training was tried at.

    Args:
        attacks: The table of attacks.

    Returns:
        By test, a text such as `rate 0.02 (did not take hold), rate 0.01`.
    """
    trained = attacks[attacks["test"].isin(attacks.loc[attacks["loss_before"].notna(), "test"])]
    return {
        str(test): ", ".join(
            str(variant) if held else f"{variant} (did not take hold)"
            for variant, held in rows.groupby("variant", sort=False)["took_hold"].first().items()
        )
        for test, rows in trained.groupby("test", sort=False)
    }


def remarks(attacks: pd.DataFrame, evidence: pd.DataFrame) -> dict[str, str]:
    """Return what a reader must know of an attack beside its residual.

    Args:
        attacks: The table of attacks.
        evidence: One row per test with the columns `test` and `variant`, the one whose residual is shown (empty: the
            model without attack).

    Returns:
        One or two sentences by test, only for tests that took hold but wrecked a model, that took hold at no strength,
        or whose training had to be tried again.
    """
    shown = dict(zip(evidence["test"], evidence["variant"], strict=True))
    strengths = tried(attacks)
    found = {}
    for name, rows in attacks.groupby("test", sort=False):
        test = str(name)
        held = rows[rows["took_hold"]]
        said = [] if held.empty else _losses(_counted(held, shown.get(test, PLAIN)))
        if held.empty:
            said.append("The attack did not take hold at any strength.")
        if test in strengths and (said or not rows["took_hold"].all()):
            said.append(f"Tried: {strengths[test]}.")
        if said:
            found[test] = " ".join(said)
    return found


def _counted(held: pd.DataFrame, shown: str) -> pd.DataFrame:
    """Return the rows of the variant whose residual is shown, or else of the one that leaves most.

    Args:
        held: Rows of the variants that took hold.
        shown: Name of the variant whose residual is shown.
    """
    if shown not in set(held["variant"]):
        left = held[held["role"].isin(list(_NAMES))].groupby("variant", sort=False)[["utility", "kept"]].min()
        shown = str(left.min(axis=1).fillna(1.0).idxmax())
    return held[held["variant"] == shown]


def _losses(variant: pd.DataFrame) -> list[str]:
    """Return a sentence on what an attack that took hold destroyed; an empty list if it left enough."""
    clauses = []
    counted = variant[variant["role"].isin(list(_NAMES)) & ~variant["costs_utility"].astype(bool)]
    worst = counted.sort_values("utility")  # NaN comes last
    if len(worst) and worst["utility"].iloc[0] < LITTLE:
        first = worst.iloc[0]
        clauses.append(
            f"the {_NAMES[first['role']]} then answers only {100 * first['utility']:.0f} % of the retain questions "
            "that it answered before"
        )
    kept = variant["kept"].min()
    if kept < LITTLE:
        clauses.append(f"the base keeps only {100 * max(kept, 0.0):.0f} % of its knowledge")
    if not clauses:
        return []
    return [
        f"The attack ({variant['variant'].iloc[0]}) took hold, but {' and '.join(clauses)}: it may have destroyed what "
        "it looks for."
    ]


def _of_test(result: StressResult) -> pd.DataFrame:
    """Return the rows of one test."""
    everything = result.frame
    frame = everything[(everything["measure"] == "rank") & (everything["variant"] != PLAIN)]
    has_plain = (everything["variant"] == PLAIN).any()
    checked = set(frame.loc[frame["role"] == "base", "variant"]) if has_plain else set()
    ranks = frame[frame["variant"].isin(checked)].groupby(["role", "variant"], sort=False)["value"].mean()
    rows = ranks.rename("rank").reset_index()
    if TABLE in result.tables:
        rows = rows.merge(result.tables[TABLE], on=["role", "variant"], how="outer")  # sorted by role and variant
    in_order = {name: number for number, name in enumerate(everything["variant"].unique())}
    rows = rows.sort_values("variant", key=lambda names: names.map(in_order), kind="stable", ignore_index=True)
    reasons = invalid_variants(result)
    kept = kept_by_base(result)
    rows = rows.assign(
        test=result.test,
        took_hold=~rows["variant"].isin(list(reasons)),
        reason=[reasons.get(variant, "") for variant in rows["variant"]],
        costs_utility=IS_USEFUL in result.settings,
        kept=[
            kept.get(variant, float("nan")) if role == "base" else float("nan")
            for role, variant in zip(rows["role"], rows["variant"], strict=True)
        ],
    )
    return rows.reindex(columns=list(COLUMNS))
