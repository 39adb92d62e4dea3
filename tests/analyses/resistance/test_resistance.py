"""The study of resistance: what the attacks find is what a plain relearning finds, and the table says it."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses.resistance.attacks import OTHER, SAME, most_recovered, steps_to_recover
from analyses.resistance.command import main
from analyses.resistance.figures import resistance_figure
from analyses.resistance.models import COMPARED
from analyses.resistance.run import CONTROL, Found, curves_of, run
from analyses.resistance.tables import geometric_mean, markdown, models_of
from analyses.resistance.worlds import World
from dissect import load_pair, load_prompts
from dissect.stress.core.case import make_case
from dissect.stress.core.finetuning import Recipe, fine_tuned
from dissect.stress.core.scores import score_facts
from dissect.stress.relearning import split
from tests.command_lines import call_main
from tests.unlearning.small_world import FACTS, N_FORGET, NAMES
from tests.unlearning.small_world import World as SmallWorld
from tests.unlearning.small_world import world as small_world  # noqa: F401
from unlearning import Example, train
from unlearning.methods import METHODS


@pytest.fixture
def studied(small_world: SmallWorld, tmp_path: Path) -> World:  # noqa: F811
    """The small world as the study has it: groups are people, and a control learned the others alone."""
    files = {}
    for name, part in (("forget", slice(0, N_FORGET)), ("retain", slice(N_FORGET, None))):
        rows = [
            {"prompt": fact.prompt, "answer": fact.answer, "group": person}
            for fact, person in zip(FACTS[part], NAMES[part], strict=True)
        ]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    small_world.tokenizer.save_pretrained(small_world.model_dir)
    control = tmp_path / "control"
    small: dict[str, Any] = {"batch_size": 16, "gradient_accumulation_steps": 1, "progress": False, "device": "cpu"}
    train(
        "finetune",
        model=small_world.model_dir,
        retain=[Example(fact.prompt, "in Rome") for fact in FACTS[:N_FORGET]] + FACTS[N_FORGET:],
        output_dir=control,
        learning_rate=4e-3,
        max_steps=60,
        **small,
    )
    options = {"learning_rate": 4e-3, "max_steps": 40, "batch_size": 16, "gradient_accumulation_steps": 1}
    return World("small", str(small_world.model_dir), str(control), files["forget"], files["retain"], options=options)


def test_a_model_is_stopped_attacked_and_kept(studied: World, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"methods": ["npo"], "rates": (0.02,), "curve": (1, 3), "judge": False, "level": 0.3}
    control, npo = run(studied, tmp_path / "out", **settings, progress=False)
    assert (control.method, npo.method) == (CONTROL, "npo")
    assert npo.forget < 0.4 and npo.stopped_by is not None and "target_forget=0.3" in npo.stopped_by
    assert npo.base[SAME] > 0.95 > control.curves[0]["rank"]

    # The same by hand: three steps on the facts themselves, and on those of the other fold.
    pair = load_pair(studied.base, str(tmp_path / "out" / "small" / "models" / "npo-seed0"), progress=False)
    forget = load_prompts(studied.forget, pair.tokenizer)
    case = make_case(pair, forget, control=None, seed=0)
    items = case.forget.prompts.items
    examples = [Example(item.prompt, item.answer) for item in items]
    after = fine_tuned(pair.unlearned, examples, Recipe(0.02, steps=3), case=case)
    found = {(row["attack"], row["steps"]): row for row in npo.curves}
    scores = score_facts(after.model, case.forget)
    assert found[SAME, 3]["rank"] == pytest.approx(float(np.nanmean(scores.rank)))
    assert found[SAME, 3]["correct"] == pytest.approx(float(scores.correct.mean()))
    correct = []
    for held_out in split(case.forget, 2, seed=0):
        rest = [example for index, example in enumerate(examples) if index not in held_out]
        taught = fine_tuned(pair.unlearned, rest, Recipe(0.02, steps=1), case=case)
        correct += score_facts(taught.model, case.forget.select(held_out)).correct.tolist()
    assert found[OTHER, 1]["correct"] == pytest.approx(np.mean(correct))
    assert set(found) == {(attack, steps) for attack in (SAME, OTHER) for steps in (0, 1, 3)}

    kept = tmp_path / "out" / "small" / "npo-seed0.json"
    kept.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(npo, steps=99))))
    assert run(studied, tmp_path / "out", **settings, progress=False)[1].steps == 99  # read, not made again
    assert len(curves_of([control, npo])) == 12


def rows(*ranks: float, rate: float = 0.02) -> list[dict[str, Any]]:
    """A curve over 0, 1, 2, 4 ... steps."""
    steps = [0, *(2**power for power in range(len(ranks) - 1))]
    return [
        {"attack": "x", "rate": rate if at else 0.0, "steps": at, "rank": rank}
        for at, rank in zip(steps, ranks, strict=True)
    ]


def test_steps_until_a_rank_is_reached() -> None:
    assert steps_to_recover(rows(0.5, 0.5, 0.7, 0.9), 0.7) == pytest.approx(2)
    assert steps_to_recover(rows(0.5, 0.5, 0.7, 0.9), 0.8) == pytest.approx(2 * 2**0.5)
    assert steps_to_recover(rows(0.5, 0.9), 0.7) == pytest.approx(0.5 * 2**0.5)
    assert steps_to_recover(rows(0.5, 0.5, 0.7, 0.9), 0.95) == math.inf
    assert steps_to_recover(rows(0.8, 0.5), 0.7) == 0
    both = rows(0.5, 0.6, 0.9) + rows(0.5, 0.9, 0.6, rate=0.08)[1:]
    assert steps_to_recover(both, 0.9) == pytest.approx(1)  # the faster of two rates


def test_the_most_that_comes_back_is_beside_the_control() -> None:
    assert most_recovered(rows(0.5, 0.6, 0.9), rows(0.5, 0.5, 0.7), 0.4) == pytest.approx(0.5)
    assert most_recovered(rows(0.5, 0.4), rows(0.5, 0.5), 0.4) == 0


def found_of(method: str, *ranks: float, seed: int = 0, world: str = "demo", **own: Any) -> Found:
    curves = [{**row, "attack": attack, "correct": 0.0} for attack in (SAME, OTHER) for row in rows(*ranks)]
    return Found(world, method, seed, base={SAME: 1.0, OTHER: 1.0}, curves=curves, **own)


def test_the_table() -> None:
    found = [
        found_of(CONTROL, 0.5, 0.5, 0.75, 1.0),
        found_of("npo", 0.5, 0.75, 1.0, 1.0, forget=0.1, retain=0.98, rounded=0.6, label="suppressed", score=0.7),
        found_of("tar", 0.5, 0.5, 0.5, 0.6, forget=0.09, retain=0.9),
        found_of("npo", 0.5, 0.75, 0.75, 0.75, world="other", forget=0.1, retain=1.0),  # no control: chance
    ]
    models = models_of(found)
    table = models.set_index(["world", "method"])
    assert table.loc[("demo", CONTROL), "same_facts"] == pytest.approx(2)
    assert table.loc[("demo", "npo"), "same_facts"] == pytest.approx(1)
    assert table.loc[("demo", "npo"), "most"] == pytest.approx(0.5)
    assert table.loc[("demo", "npo"), "rounded"] == pytest.approx(0.2)
    assert math.isinf(table.loc[("demo", "tar"), "other_facts"])
    assert table.loc[("other", "npo"), "same_facts"] == pytest.approx(1)
    lines = markdown(models, 4).splitlines()
    assert lines[2].startswith("| demo | never trained on them |  | 2 |")
    assert lines[3] == "| demo | `npo` | 0.10 / 0.98 | 1 | 0.71 | 0.50 | 0.20 | suppressed (0.70) |"
    assert lines[4].startswith("| demo | `tar` | 0.09 / 0.90 | > 4 | > 4 |")
    chart = resistance_figure(models, most_steps=4)
    marks = [trace for trace in chart.data if trace.name.startswith("half") and len(trace.y) == 2]
    assert list(marks[0].x) == [1, 8] and list(marks[0].y) == ["npo", "tar"]


def test_means_over_seeds() -> None:
    assert geometric_mean(pd.Series([2.0, 8.0]), 64) == "4"
    assert geometric_mean(pd.Series([math.inf, math.inf]), 64) == "> 64"
    assert geometric_mean(pd.Series([2.0, math.inf]), 64) == "> 16"  # infinity counts as 128
    assert geometric_mean(pd.Series([0.0, 0.0]), 64) == "0"


def test_every_method_with_a_retain_loss_is_compared_or_left_out_for_a_reason() -> None:
    assert set(COMPARED) <= set(METHODS)
    assert len(set(COMPARED)) == len(COMPARED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "npos"], "--method must name a method with a retain loss, got 'npos'.*npo"),
        (["--level", "1.5"], "--level must be between 0 and 1, got 1.5"),
        (["--no-demo"], "--no-demo leaves nothing to study"),
        (["--seeds", "a"], "--seeds must be whole numbers"),
        (["--format", "gif"], "formats? must be among"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = call_main(main, *arguments, "--out", tmp_path / "out", "--quiet")
    assert done.code == 2
    assert re.search(message, done.err)
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
