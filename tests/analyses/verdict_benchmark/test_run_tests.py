"""Building and examining constructed models, in a world small enough for a test."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from analyses.verdict_benchmark import run_tests as testing
from analyses.verdict_benchmark.command import command, run_family
from analyses.verdict_benchmark.families import TRUTH, Family, Truth, build, build_ground
from analyses.verdict_benchmark.measured import read_measured
from analyses.verdict_benchmark.recipes import never
from dissect.models.model import load_model
from dissect.stress.lenses import logit_lens
from dissect.stress.without_attack import without_attack
from dissect.zoo.world import WorldSize
from unlearning import InputError

SMALL = WorldSize(forget_people=4, trunk_people=4, new_people=2, values=16, things=6, largest_summand=4)


@pytest.fixture
def two_tests(monkeypatch):
    """The cheapest ones, and a CKA that costs nothing; how often each model was attacked."""
    calls: list[tuple[str, str | None]] = []

    def counted(test):
        def run(case):
            calls.append((test.__name__, case.only))
            return test(case)

        return run

    monkeypatch.setattr(
        testing, "battery", lambda _: {one.__name__: counted(one) for one in (without_attack, logit_lens)}
    )
    monkeypatch.setattr(testing, "geometry", lambda _: SimpleNamespace(erasure=0.25))
    return calls


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    one = Family("llama", 1, tmp_path_factory.mktemp("benchmark") / "models", size=SMALL, epochs=(1, 2))
    build_ground(one)
    for order in (1, 2):
        build(
            one,
            f"never-order{order}",
            lambda own, order=order: never(own, order),
            truth=Truth("erased", 0.0),
            recipe={"order": order},
        )
    return one


def test_base_and_never_are_attacked_once_and_give_what_they_would_give_each_time(family, tmp_path, two_tests):
    examiner = testing.Examiner(family, tmp_path)
    for order in (1, 2):
        examiner.examine(f"never-order{order}")
    assert two_tests == [
        *(("without_attack", None), ("logit_lens", None)),
        *(("without_attack", "unlearned"), ("logit_lens", "unlearned")),
    ]
    case = examiner.case(load_model(family.path / "never-order2"))
    kept = testing.read_results(examiner.out / "never-order2")
    order = ["role", "variant", "measure", "example_index"]
    for test in (without_attack, logit_lens):
        whole = test(case)
        ours, theirs = (one.frame.sort_values(order, ignore_index=True) for one in (kept[whole.test], whole))
        pd.testing.assert_frame_equal(ours, theirs)
        assert kept[whole.test].residual() == whole.residual()


def test_a_model_that_was_examined_is_not_examined_again(family, tmp_path, two_tests):
    testing.Examiner(family, tmp_path).examine("never-order1")
    done = len(two_tests)
    testing.Examiner(family, tmp_path).examine("never-order1")
    assert len(two_tests) == done
    (tmp_path / "models").symlink_to(family.folder)
    (measured,) = read_measured(tmp_path, ["llama"], [1])
    assert (measured.name, measured.kind, measured.share) == ("never-order1", "erased", 0.0)
    assert set(measured.residuals) == {"without_attack", "logit_lens"}
    assert measured.rivals["1 − CKA erasure"] == 0.75


def test_a_test_that_was_stopped_goes_on(family, tmp_path, two_tests, monkeypatch):
    def stopped(_case):
        raise KeyboardInterrupt

    tests = testing.battery(None)
    with monkeypatch.context() as patched:
        patched.setattr(
            testing, "battery", lambda _: {"without_attack": tests["without_attack"], "logit_lens": stopped}
        )
        with pytest.raises(KeyboardInterrupt):
            testing.Examiner(family, tmp_path).examine("never-order1")
    testing.Examiner(family, tmp_path).examine("never-order1")
    assert [name for name, _ in two_tests] == ["without_attack", "logit_lens"]


@pytest.mark.usefixtures("two_tests")
def test_a_test_that_cannot_be_run_is_kept_with_its_reason(family, tmp_path, monkeypatch):
    def refused(_case):
        raise InputError("no retain questions")

    tests = testing.battery(None)
    monkeypatch.setattr(testing, "battery", lambda _: {"without_attack": tests["without_attack"], "probe": refused})
    examiner = testing.Examiner(family, tmp_path)
    examiner.examine("never-order1")
    assert testing.read_tests(examiner.out / "never-order1")["tests"]["probe"] == {"failed": "no retain questions"}
    assert set(testing.read_results(examiner.out / "never-order1")) == {"without_attack"}


@pytest.mark.usefixtures("two_tests")
def test_tests_of_another_model_of_that_name_are_refused(family, tmp_path):
    examiner = testing.Examiner(family, tmp_path)
    examiner.examine("never-order1")
    path = examiner.out / "never-order1" / testing.RECORD
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"configuration": {"recipe": {"order": 7}}}))
    with pytest.raises(InputError, match="holds tests of another model"):
        examiner.examine("never-order1")


def test_a_model_says_what_it_is_and_another_recipe_is_refused(family):
    truth = json.loads((family.path / "never-order1" / TRUTH).read_text())
    assert (truth["kind"], truth["share"]) == ("erased", 0.0)
    assert set(truth["answers"]) == {"forget", "retain"} and truth["answers"]["forget"] < 0.5
    with pytest.raises(InputError, match="holds a model of another recipe"):
        build(family, "never-order1", lambda own: never(own, 1), truth=Truth("erased", 0.0), recipe={"order": 9})


def test_two_orders_of_the_data_are_two_models(family):
    first, second = (load_model(family.path / f"never-order{order}") for order in (1, 2))
    assert first.sha256 != second.sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architectures": "llama,gpt"}, "--architectures.*gpt"),
        ({"seeds": "1,two"}, "--seeds.*1,two"),
        ({"formats": "html,bmp"}, "format.*bmp"),
        ({"only": "never-order1,nothing"}, "--only must be.*got nothing"),
    ],
)
def test_bad_options_are_refused_before_anything_is_built(options, message, tmp_path):
    given = {"out": tmp_path, "seeds": "3", "architectures": "llama", "only": None, "workers": 1, "quick": False}
    with pytest.raises(InputError, match=message):
        command(**{**given, "fit": None, "formats": "html", **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_quick_benchmark_tells_what_was_erased_from_what_was_suppressed(tmp_path):
    from analyses.verdict_benchmark.command import QUICK_MODELS, QUICK_SEED
    from analyses.verdict_benchmark.report import judged
    from dissect.verdicts.rule import frozen_rules

    for architecture in ("llama", "neox"):
        run_family(architecture, QUICK_SEED, tmp_path, QUICK_MODELS)
    frame = judged(read_measured(tmp_path, ["llama", "neox"], [QUICK_SEED]), frozen_rules())
    assert len(frame) == 2 * len(QUICK_MODELS)
    erased, suppressed = (frame[frame["kind"] == kind] for kind in ("erased", "suppressed"))
    assert not erased["label"].isin(["suppressed", "not unlearned"]).any()
    assert suppressed["label"].isin(["suppressed", "not unlearned"]).all()
    assert erased["score"].max() < suppressed["score"].min()
