"""The scale of an attack: what it finds where nothing is, and of what was hidden a moment ago."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from dissect.stress.core.result import DRAWS
from dissect.stress.core.scores import MEASURES
from unlearning.common.bootstrap import LEVEL, Estimate, times_drawn, widening

HIDDEN, NEVER_SHOWN, USER = "hidden", "never shown", "forget"
"""The three sets of facts, values of the column `facts`."""

MODEL, COPY = "model", "copy"
"""The attacked models, values of the column `model`: the user's unlearned model, and its copy with planted people."""

COLUMNS = ("attack", "facts", "model", "stage", "measure", "example", "group", "value")
"""Columns of `SpikeIns.frame`."""

_ONE_SIDED = 1.645
"""Standard normal quantile of .95."""


@dataclass(frozen=True)
class Scale:
    """Where the user's facts stand between what never was there and what was hidden a moment ago.

    Attributes:
        attack: Name of the attack.
        zero: Mean rank under the attack of people whom the attacked model was never shown.
        ceiling: Zero, plus what planting and hiding added to the hidden people's mean rank under the attack.
        user: Mean rank of the user's facts under the attack.
        score: (user - zero) / (ceiling - zero); None if the attack does not find the hidden people.
        power: Share of the hidden people who were found: planting added more to their rank under the attack than it
            adds to that of 95 % of the never shown (normal approximation).
        moved: What planting added to the rank of the never shown people, which should be about 0.

    All intervals are over people.
    """

    attack: str
    zero: Estimate
    ceiling: Estimate
    user: Estimate
    score: Estimate | None
    power: float
    moved: Estimate


def scale_of(attack: str, rows: pd.DataFrame, seed: int) -> Scale:
    """Return the scale of one attack from its rows of the frame."""
    ranks = rows[(rows["measure"] == MEASURES[0]) & (rows["stage"] == "attacked")]
    user = ranks[ranks["facts"] == USER].dropna(subset="value")
    invented = ranks[ranks["facts"] != USER].pivot(index=["facts", "group", "example"], columns="model", values="value")
    invented = invented.dropna().groupby(level=["facts", "group"]).mean()  # one row per person
    people = invented[[MODEL, COPY]]
    hidden, never = (
        people[people.index.get_level_values("facts") == name].to_numpy() for name in (HIDDEN, NEVER_SHOWN)
    )
    unknown = hidden[:, 0], never.mean(axis=1)
    added, moved = (of_person[:, 1] - of_person[:, 0] for of_person in (hidden, never))

    def draws(number: int, n: int) -> Float[np.ndarray, "draw person"]:
        """Return how often each person is drawn: first as the data are, then in every bootstrap draw."""
        drawn = times_drawn(np.arange(n), draws=DRAWS, seed=[seed, number])
        return np.concatenate([np.ones((1, n)), drawn]) / n

    of_hidden, of_never = draws(0, len(hidden)), draws(1, len(never))
    persons = user.groupby("group")["value"].agg(["sum", "size"]) if user["group"].ne("").all() else None
    if persons is None:  # facts without a group are groups of one
        persons = pd.DataFrame({"sum": user["value"], "size": 1})
    of_user = draws(2, len(persons))
    n_people = len(hidden) + len(never)
    zero = (of_hidden @ unknown[0] * len(hidden) + of_never @ unknown[1] * len(never)) / n_people
    gain = of_hidden @ added
    theirs = (of_user @ persons["sum"].to_numpy()) / (of_user @ persons["size"].to_numpy())
    found = _estimate(gain, len(hidden)).low > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (theirs - zero) / gain
    score = _estimate(shares, len(persons), fewest=min(len(hidden), len(persons))) if found else None
    return Scale(
        attack=attack,
        zero=_estimate(zero, n_people),
        ceiling=_estimate(zero + gain, len(hidden)),
        user=_estimate(theirs, len(persons)),
        score=score,
        power=float((added > moved.mean() + _ONE_SIDED * moved.std(ddof=1)).mean()),
        moved=_estimate(of_never @ moved, len(never)),
    )


def _estimate(values: Float[np.ndarray, " draw"], n: int, *, fewest: int | None = None) -> Estimate:
    """Return the first value with the interval of the others, widened for n people, or for the fewest of several."""
    people = n if fewest is None else fewest
    if people < 2:
        return Estimate(float(values[0]), np.nan, np.nan, n)
    drawn = values[0] + widening(people) * (values[1:] - values[0])
    low, high = np.quantile(drawn[np.isfinite(drawn)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high), n)


PERCENTAGES = (
    "Percentages tell how far the right answers rank above chance: 0 % at chance, 100 % above all distractors."
)
"""What the percentages in the sentences are."""


def sentence(scale: Scale) -> str:
    """Return what an attack's scale says, in words.

    Args:
        scale: The scale.

    Returns:
        One or two sentences with numbers; the percentages are those of `PERCENTAGES`.
    """

    def above_chance(rank: Estimate) -> str:
        share, low, high = (200 * value - 100 for value in (rank.value, rank.low, rank.high))
        return f"{share:.0f} % [{low:.0f}, {high:.0f}]"

    hidden, unknown, user = map(above_chance, (scale.ceiling, scale.zero, scale.user))
    found = (
        f"In this model {scale.attack} brings back {hidden} of the invented facts that were hidden and {unknown} of "
        f"those never shown; of yours {user}"
    )
    if scale.score is None:
        return (
            f"{found}. For {scale.ceiling.n} hidden people the difference is within chance, so that what the attack "
            "can show in this model is not known: invent more people (`spike_ins`), or rely on other attacks."
        )
    score = scale.score
    return (
        f"{found}. Yours stand at {score.value:.2f} [{score.low:.2f}, {score.high:.2f}] (0: as those never shown, 1: "
        "as those hidden)."
    )
