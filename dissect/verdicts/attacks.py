"""How each attack went: what the base kept, whether the training losses fell, and what utility was left."""

from collections.abc import Iterable

import pandas as pd

from dissect.stress.core.result import PLAIN, StressResult
from dissect.stress.core.validity import TABLE, invalid_variants

COLUMNS = ("test", "variant", "took_hold", "reason", "role", "rank", "loss_before", "loss_after", "utility")
"""Columns of the table of attacks."""


def attack_table(results: Iterable[StressResult]) -> pd.DataFrame:
    """Return how every variant of every attack went.

    Args:
        results: Results of all tests; those without values of the base under a variant cannot be checked and are left
            out.

    Returns:
        One row per test, variant and role with the columns `COLUMNS`: `took_hold` and `reason` (why not) of the
        variant, `rank` (mean rank of the right answers of the model under it), and for attacks by training
        `loss_before` and `loss_after` (of the taught texts, nats per token) and `utility` (share of the retain
        questions answered before that are still answered); NaN where they were not measured.
    """
    tables = [_of_test(result) for result in results]
    known = [table for table in tables if len(table)]
    return pd.concat(known, ignore_index=True) if known else pd.DataFrame(columns=list(COLUMNS))


def _of_test(result: StressResult) -> pd.DataFrame:
    """Return the rows of one test."""
    frame = result.frame
    frame = frame[(frame["measure"] == "rank") & (frame["variant"] != PLAIN)]
    has_plain = (result.frame["variant"] == PLAIN).any()
    checked = set(frame.loc[frame["role"] == "base", "variant"]) if has_plain else set()
    ranks = frame[frame["variant"].isin(checked)].groupby(["role", "variant"], sort=False)["value"].mean()
    rows = ranks.rename("rank").reset_index()
    if TABLE in result.tables:
        rows = rows.merge(result.tables[TABLE], on=["role", "variant"], how="outer", sort=False)
    reasons = invalid_variants(result)
    rows = rows.assign(
        test=result.test,
        took_hold=~rows["variant"].isin(list(reasons)),
        reason=[reasons.get(variant, "") for variant in rows["variant"]],
    )
    return rows.reindex(columns=list(COLUMNS))
