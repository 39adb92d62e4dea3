import warnings

import pytest

from unlearning.common.renamed import renamed_arguments


@renamed_arguments(never="control", n_facts="limit")
def asked(pair, *, control="auto", limit=None):
    return pair, control, limit


def test_new_names_pass_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked("pair", control=None, limit=3) == ("pair", None, 3)
    assert asked.__name__ == "asked"


def test_old_names_are_accepted_with_one_warning():
    with pytest.warns(DeprecationWarning, match="never.*control.*n_facts.*limit") as warned:
        assert asked("pair", never="none", n_facts=3) == ("pair", "none", 3)
    assert len(warned) == 1


def test_both_names_are_refused():
    with pytest.raises(TypeError, match="control.*never"):
        asked("pair", never="none", control="none")
