"""The search of the learning rate: what it chooses among known answers, and the run that uses it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unlearning.small_world import FORGET, RETAIN
from unlearning import train
from unlearning.common.errors import InputError
from unlearning.training.tuning import FILE, KEPT, MOST_TRIALS, Trial, search_rate

SETTINGS = {"forget": FORGET, "retain": RETAIN, "max_steps": 6, "batch_size": 4, "progress": False}


def model_of(best: float, width: float) -> Callable[[float], Trial]:
    """Return a made-up run: forgetting and loss are logistic in the log of the rate, the loss `width` later."""

    def run(rate: float) -> Trial:
        where = math.log10(rate / best)
        return Trial(rate, 1 / (1 + math.exp(8 * (where + 0.2))), 1 / (1 + math.exp(8 * (where - width))))

    return run


@given(st.floats(-6, -2), st.floats(-1, 1), st.floats(0.6, 1.2))
def test_a_good_rate_is_found_where_there_is_one(exponent: float, offset: float, width: float) -> None:
    run = model_of(10**exponent, width)
    chosen, trials = search_rate(run, 10 ** (exponent + offset))
    assert chosen.good and chosen in trials and len(trials) <= MOST_TRIALS
    assert [trial.good for trial in trials] == [False] * (len(trials) - 1) + [True]


def test_without_a_good_rate_the_nearest_is_taken() -> None:
    run = model_of(1e-4, -0.5)
    chosen, trials = search_rate(run, 1e-4)
    assert len(trials) == MOST_TRIALS and not any(trial.good for trial in trials)
    assert chosen.retain - chosen.forget == max(trial.retain - trial.forget for trial in trials)


def test_a_run_takes_the_rate_that_was_found(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = train("npo", model=model_dir, tune=True, learning_rate=1e-6, output_dir=out, **SETTINGS)
    kept = json.loads((out / FILE).read_text())
    assert found.options["learning_rate"] == kept["learning_rate"]
    assert len(kept["trials"]) > 1 and kept["trials"][0]["learning_rate"] == 1e-6
    rates = [trial["learning_rate"] for trial in kept["trials"]]
    if kept["trials"][0]["retain"] >= KEPT:
        assert rates[1] == pytest.approx(3e-6)
    plain = train("npo", model=model_dir, learning_rate=kept["learning_rate"], **SETTINGS)
    assert plain.history == found.history
    for trial in kept["trials"]:
        if trial["learning_rate"] == kept["learning_rate"]:  # the sample is the whole set here, and so is the trial
            first, last = plain.evaluations[0], plain.final
            assert trial["forget"] == pytest.approx(last["forget_probability"] / first["forget_probability"])


def test_a_resumed_run_keeps_the_rate(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": model_dir, "tune": True, "learning_rate": 1e-6, "output_dir": tmp_path / "run", **SETTINGS}

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            "unlearning.training.train.finish_run", stop
        )  # trials have no directory, so they do not end here
        with pytest.raises(KeyboardInterrupt):
            train("npo", **settings)
    kept = json.loads((tmp_path / "run" / FILE).read_text())["learning_rate"]
    monkeypatch.setattr("unlearning.training.tuning.search_rate", stop)
    assert train("npo", resume=True, **settings).options["learning_rate"] == kept


@pytest.mark.parametrize("method", ["altpo", "whp", "finetune"])
def test_methods_without_a_rate_to_search_are_refused(method: str, model_dir: Path) -> None:
    data = {"retain": RETAIN} if method == "finetune" else {"forget": FORGET, "retain": RETAIN}
    options = {"alpha": 1} if method == "whp" else {}
    with pytest.raises(InputError, match=f"`tune`.*{method}"):
        train(method, model=model_dir, tune=True, progress=False, **data, **options)
