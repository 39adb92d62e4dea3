"""The study of defaults: every method is tried once, what it left is measured anew, what cannot run says why."""

import dataclasses
import json
from pathlib import Path

import pytest

from analyses.defaults.command import main
from analyses.defaults.run import NAMES, Row, run
from analyses.defaults.tables import WHY, frame_of, markdown
from analyses.defaults.worlds import World, demo_world, language_model_world
from tests.command_lines import call_main
from tests.unlearning.helpers import build_examples, build_tiny_llama, build_tokenizer
from unlearning import train
from unlearning.common.errors import InputError
from unlearning.data.encoding import encode
from unlearning.evaluation.answers import answer_likelihoods
from unlearning.methods import METHODS


@pytest.fixture
def world(tmp_path: Path) -> World:
    build_tiny_llama(0).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    examples = build_examples()
    return World("tiny", str(tmp_path / "base"), examples[:3], examples[3:], {"append_eos": False, "max_steps": 2})


def test_what_is_left_is_what_the_trained_model_answers(world: World, tmp_path: Path) -> None:
    row, refused = run(world, tmp_path / "out", methods=["npo", "whp"], progress=False)
    result = train(
        "npo", model=world.base, forget=world.forget, retain=world.retain, progress=False, append_eos=False, max_steps=2
    )
    spans = encode(result.tokenizer, world.forget, append_eos=False, max_length=None).spans
    left = answer_likelihoods(result.model, spans, batch_size=2)["probability"]
    assert row.forget_after == pytest.approx(left, rel=1e-5)
    assert row.learning_rate == result.options["learning_rate"] and row.steps == 2
    assert refused.refused is not None and "anchors" in refused.refused

    kept = tmp_path / "out" / "tiny" / "npo.json"
    kept.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(row, steps=99))))
    assert run(world, tmp_path / "out", methods=["npo"], progress=False)[0].steps == 99  # read, not trained again


def test_the_table_says_what_reached_the_aim_and_why_not() -> None:
    good = Row("demo", "npo", 0.8, 0.9, forget_after=0.16, retain_after=0.81, steps=3)
    rows = [
        good,
        dataclasses.replace(good, method="ga", retain_after=0.4),
        dataclasses.replace(good, method="whp", refused="no dictionary"),
        dataclasses.replace(good, world="other", forget_after=0.17),
    ]
    assert (good.forgot, good.kept) == (True, True)
    assert frame_of(rows)["reached"].tolist() == [True, False, True, False]
    lines = markdown(rows).splitlines()
    assert lines[0] == "| method | demo: forget / retain left | other: forget / retain left | if not reached, why |"
    assert lines[2:] == [
        "| `npo` | 0.20 / 0.90 | *0.21 / 0.90* |  |",
        f"| `ga` | *0.20 / 0.44* |  | {WHY['ga']} |",
        "| `whp` | not run |  |  |",
    ]


def test_every_method_that_forgets_is_tried() -> None:
    assert set(METHODS) - set(NAMES) == {"finetune"}
    assert set(WHY) <= set(NAMES)
    assert len(demo_world().forget) >= 100


def test_bad_input_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="knows 0"):
        language_model_world(world.base)
    for arguments, said in (
        (("--method", "npoo"), "did you mean 'npo'"),
        (("--tofu", tmp_path / "none"), "run `python -m analyses.tofu_pair"),
        (("--model", world.base), "which knows 0"),
    ):
        outcome = call_main(main, *arguments, "--out", tmp_path / "x", "--quiet")
        assert outcome.code == 2 and said in outcome.err and len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
