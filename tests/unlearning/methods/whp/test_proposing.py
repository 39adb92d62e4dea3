"""Proposed dictionaries."""

import pytest

from tests.unlearning.methods.whp.story import BACKGROUND, STORY
from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.proposing import propose_by_contrast
from unlearning.methods.whp.terms import words_of
from unlearning.methods.whp.translation import translate


def test_a_proposed_dictionary_translates_the_story() -> None:
    proposals = propose_by_contrast([STORY], [BACKGROUND], min_ratio=2, seed=3)
    anchors = Anchors({proposal.anchor: proposal.generic for proposal in proposals})
    translated = translate(STORY, anchors).target
    assert not {"mira", "vell", "vells", "ostrel", "toras"} & words_of([translated])
    assert proposals == propose_by_contrast([STORY], [BACKGROUND], min_ratio=2, seed=3)
    assert propose_by_contrast([STORY], [BACKGROUND], min_ratio=2, limit=2)[0].count == 3
    with pytest.raises(InputError, match="no expression is peculiar.*`background`"):
        propose_by_contrast([STORY], [STORY])
