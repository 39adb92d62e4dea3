"""Spike-ins with ranks that are given."""

import pandas as pd

from dissect.stress.spike_ins.result import SpikeIns
from dissect.stress.spike_ins.scale import COLUMNS, COPY, HIDDEN, MODEL, NEVER_SHOWN, USER

KNOWN = {
    (HIDDEN, MODEL): [[0.4, 0.6], [0.5, 0.5], [0.6, 0.5]],
    (HIDDEN, COPY): [[0.9, 0.8], [0.8, 0.9], [0.5, 0.6]],
    (NEVER_SHOWN, MODEL): [[0.5, 0.7], [0.3, 0.4], [0.5, 0.5]],
    (NEVER_SHOWN, COPY): [[0.5, 0.6], [0.4, 0.4], [0.5, 0.6]],
    (USER, MODEL): [[0.7, 0.6], [0.6, 0.7], [0.7, 0.7]],
}


def frame_of(ranks):
    """A frame with one fact per rank: {(facts, model): [[ranks of the first person], ...]}."""
    rows = [
        ("relearn_disjoint", facts, of, "attacked", "rank", f"{facts}-{person}-{number}", f"{facts}-{person}", rank)
        for (facts, of), people in ranks.items()
        for person, values in enumerate(people)
        for number, rank in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def known_people(ranks):
    """Spike-ins with these ranks."""
    people = pd.DataFrame(columns=["facts", "name", "prompt", "answer"])
    return SpikeIns(frame=frame_of(ranks), stages=pd.DataFrame(), people=people, settings={}, seconds=0.0)
