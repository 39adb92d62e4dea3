"""Base and never attacked once for all their unlearned models: the numbers are those of attacking them each time."""

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from dissect import InputError
from dissect.stress import relearning
from dissect.stress.catalogue import entries
from dissect.stress.core import finetuning
from dissect.stress.core.finetuning import Recipe, fine_tuned_at
from dissect.stress.core.sharing import attacked
from dissect.stress.directions import own_direction
from dissect.stress.lenses import logit_lens
from dissect.stress.relearning import relearn_disjoint, relearn_speed
from tests.dissect.stress.constructed import case_of, model

TESTS = {entry.name: entry for entry in entries(None)}


@pytest.fixture
def cases():
    """Of two unlearned models of one base."""
    return [case_of(model(f"demo:{name}"), n=16) for name in ("npo", "grad_diff")]


def in_order(frame: pd.DataFrame) -> pd.DataFrame:
    names = [name for name in frame if not pd.api.types.is_float_dtype(frame[name])]
    return frame.sort_values(names, ignore_index=True)


def check_the_same(name, test, cases, folder, compares_models=False):
    attacked(name, test, cases[0], folder, compares_models=compares_models)
    seen = []

    def counted(case):
        seen.append(case.only)
        return test(case)

    found, alone = attacked(name, counted, cases[1], folder, compares_models=compares_models), test(cases[1])
    assert seen == [None if compares_models else "unlearned"]
    pd.testing.assert_frame_equal(in_order(found.frame), in_order(alone.frame))
    assert set(found.tables) == set(alone.tables)
    for table, rows in found.tables.items():
        pd.testing.assert_frame_equal(in_order(rows), in_order(alone.tables[table]))
    assert found.residual() == alone.residual()


@pytest.mark.parametrize("test", [logit_lens, partial(own_direction, layers=(3,), limit=8)], ids=["lens", "direction"])
def test_two_models_that_share_get_what_each_gets_alone(test, cases, tmp_path):
    check_the_same("some_test", test, cases, tmp_path)


@pytest.mark.parametrize(
    "test",
    [
        partial(relearn_disjoint, recipes=[Recipe(0.02, steps=2), Recipe(0.03, steps=2)]),
        partial(relearn_speed, recipes=[Recipe(0.02)], curve=(1, 2)),
    ],
    ids=["disjoint", "speed"],
)
def test_a_test_that_searches_attacks_base_and_control_once(test, cases, tmp_path, monkeypatch):
    check_the_same("relearning", test, cases, tmp_path, compares_models=True)
    trained = []

    def spy(model, *args, **options):
        trained.append(model.name)
        return fine_tuned_at(model, *args, **options)

    monkeypatch.setattr(finetuning, "fine_tuned_at", spy)
    monkeypatch.setattr(relearning, "fine_tuned_at", spy)
    attacked("relearning", test, cases[1], tmp_path, compares_models=True)
    assert set(trained) == {"demo:grad_diff"}


def test_a_search_goes_on_with_rates_that_were_not_shared(cases, tmp_path, monkeypatch):
    """The first model needs one rate, the second another: each gets what it gets alone."""
    allowed = {"demo:npo": "rate 0.02", "demo:grad_diff": "rate 0.01"}

    def invalid(result):
        variants = result.frame["variant"].unique()
        return {variant: "not this one" for variant in variants if variant and variant != allowed[name]}

    monkeypatch.setattr("dissect.stress.core.searching.invalid_variants", invalid)
    test = partial(relearn_speed, curve=(1,))
    for case in cases:
        name = case.pair.unlearned.name
        found, alone = (
            attacked("relearn_speed", test, case, folder, compares_models=True) for folder in (tmp_path, None)
        )
        pd.testing.assert_frame_equal(found.frame, alone.frame)
        pd.testing.assert_frame_equal(found.tables["validity"], alone.tables["validity"])
        assert found.settings == alone.settings and found.notes == alone.notes
        assert found.settings["tried"][-1]["variant"] == allowed[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TESTS)
def test_every_test_can_share(name, cases, tmp_path):
    check_the_same(name, TESTS[name].runs["full"], cases, tmp_path, TESTS[name].compares_models)


def test_what_was_cut_off_is_attacked_again(cases, tmp_path):
    attacked("logit_lens", logit_lens, cases[0], tmp_path)
    (tmp_path / "logit_lens.json").unlink()
    seen = []
    attacked("logit_lens", lambda case: seen.append(case.only) or logit_lens(case), cases[1], tmp_path)
    assert seen == [None]


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_file_that_is_no_record_is_refused(content, cases, tmp_path):
    (tmp_path / "logit_lens.json").write_text(content)
    with pytest.raises(InputError, match="not a record of a shared test .* Remove"):
        attacked("logit_lens", logit_lens, cases[0], tmp_path)


def test_without_a_directory_every_model_is_attacked(cases, tmp_path):
    seen = []
    attacked("logit_lens", lambda case: seen.append(case.only) or logit_lens(case), cases[0], None)
    assert seen == [None] and list(tmp_path.iterdir()) == []
    assert replace(cases[0], only="unlearned").models.keys() == {"unlearned"}
