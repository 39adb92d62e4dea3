from dataclasses import replace

import numpy as np
import pytest

from dissect.stress.spike_ins.figures import spike_ins_figure
from dissect.stress.spike_ins.scale import COPY, HIDDEN, MODEL, NEVER_SHOWN, USER
from tests.dissect.stress.spike_ins.constructed import KNOWN, frame_of, known_people


def test_the_scale_is_that_of_its_formulas():
    (scale,) = known_people(KNOWN).scales()
    unknown = [0.5, 0.5, 0.55, *np.mean([[0.6, 0.55], [0.35, 0.4], [0.5, 0.55]], axis=1)]
    gain = np.mean([0.85 - 0.5, 0.85 - 0.5, 0.55 - 0.55])
    assert scale.zero.value == pytest.approx(np.mean(unknown))
    assert scale.ceiling.value == pytest.approx(np.mean(unknown) + gain)
    assert scale.user.value == pytest.approx(4.0 / 6)
    assert scale.moved.value == pytest.approx(np.mean([-0.05, 0.05, 0.05]))
    assert scale.power == pytest.approx(2 / 3)
    if scale.score is not None:
        assert scale.score.value == pytest.approx((4.0 / 6 - np.mean(unknown)) / gain)


def test_a_user_who_is_where_the_people_are_scores_nought_or_one():
    hidden = [[0.9, 0.9]] * 5
    ranks = {(HIDDEN, MODEL): [[0.5, 0.5]] * 5, (HIDDEN, COPY): hidden}
    ranks |= {(NEVER_SHOWN, of): [[0.5, 0.5]] * 5 for of in (MODEL, COPY)}
    for theirs, expected in (([[0.5, 0.5]] * 5, 0.0), (hidden, 1.0), ([[0.7, 0.7]] * 5, 0.5)):
        found = known_people(ranks | {(USER, MODEL): theirs})
        score = found.scales()[0].score
        assert (score.value, score.low, score.high) == pytest.approx((expected,) * 3)
        assert f"Yours stand at {expected:.2f} [" in found.sentences()[0]


def test_an_attack_that_does_not_find_the_planted_people_gives_no_score():
    ranks = KNOWN | {(HIDDEN, COPY): [[0.4, 0.7], [0.5, 0.4], [0.6, 0.5]]}
    found = known_people(ranks)
    assert found.scales()[0].score is None
    assert "the difference is within chance" in found.sentences()[0]
    assert "score" not in set(found.table()["number"])


def test_facts_without_a_rank_and_facts_without_a_group_are_taken_as_they_are():
    frame = frame_of(KNOWN | {(USER, MODEL): [[0.7, np.nan], [0.5, 0.9]]})
    frame.loc[frame["facts"] == USER, "group"] = ""
    found = replace(known_people(KNOWN), frame=frame)
    user = found.scales()[0].user
    assert user.value == pytest.approx(0.7) and user.n == 3
    assert user.low < 0.7 < user.high


def test_the_figure_shows_the_three_sets_of_every_attack():
    scales = known_people(KNOWN).scales()
    chart = spike_ins_figure(scales)
    assert [trace.name for trace in chart.data] == ["invented, never shown", "invented, hidden", "yours"]
    drawn = [trace.x[0] for trace in chart.data]
    assert drawn == [scales[0].zero.value, scales[0].ceiling.value, scales[0].user.value]
    ends = chart.data[2].error_x
    assert drawn[2] - ends["arrayminus"][0] == pytest.approx(scales[0].user.low)
