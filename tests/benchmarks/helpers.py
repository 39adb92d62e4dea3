"""Builders: a tiny pair and ragged prompts, KRS worked out without the toolkit, and command lines in process."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Case, paper_sweeps
from benchmarks.contestants import CONTESTANTS
from benchmarks.models import build_pair, random_prompts
from benchmarks.shapes import Shape
from dissect.prompts.prompts import Batch
from tests.command_lines import Outcome
from tests.dissect.helpers import PlainPatcher

MICRO = Shape("micro", 2, 32, 48, 4, 2, 60, prompts=4, tokens=11, answer=3)
Side = Literal["left", "right"]


def build_micro_case(side: Side = "right", *, width: int = 1) -> Case:
    """Two layers of width 32; four prompts of different lengths in batches of three and one."""
    pair = build_pair(MICRO)
    with torch.no_grad():  # as drawn, so narrow a model's blocks hardly move its logits
        for model in (pair.base.hf, pair.unlearned.hf):
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter.mul_(10)
    prompts = random_prompts(MICRO.vocab, [11, 5, 8, 9], answer=MICRO.answer)
    batches = prompts.batches(3, padding_side=side)
    return Case("micro", pair, tuple(batches), paper_sweeps(pair.n_layers, width))


def krs_by_hand(case: Case) -> np.ndarray:
    """KRS [intervention, example] from plain PyTorch hooks and copies of the unlearned model, in numpy."""
    return np.concatenate([_krs_of_batch(case, batch) for batch in case.batches], axis=1)


@torch.no_grad()
def _krs_of_batch(case: Case, batch: Batch) -> np.ndarray:
    base, unlearned = case.pair.base.hf, case.pair.unlearned.hf
    assert batch.position_ids is not None
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    runs = PlainPatcher(base, unlearned, inputs)

    def losses(logits: Tensor) -> np.ndarray:
        square = ((logits - runs.base_logits()).numpy().astype(np.float64) ** 2).mean(-1)
        places = [batch.columns[batch.rows == row].numpy() for row in range(len(batch.examples))]
        return np.array([square[row, columns].mean() for row, columns in enumerate(places)])

    rows = []
    for item in case.interventions:
        if item.kind == "patch":
            after = losses(runs.logits(item.sites, item.window.layers))
        else:
            restored = copy.deepcopy(unlearned)
            for layer in item.window.layers:
                name = f"model.layers.{layer}.mlp.down_proj"
                restored.get_submodule(name).load_state_dict(base.get_submodule(name).state_dict())
            after = losses(PlainPatcher(base, restored, inputs).logits())
        rows.append(1 - after / losses(runs.logits()))
    return np.array(rows)


def krs_of(name: str, case: Case) -> np.ndarray:
    """What a contestant gets."""
    krs: np.ndarray = CONTESTANTS[name].load()(case.pair, case.interventions)(case.batches).numpy()
    return krs


def krs_in_own_process(name: str, side: Side, path: Path) -> np.ndarray:
    """What a contestant that changes Python or torch on import gets of the micro case."""
    command = [sys.executable, "-m", "tests.benchmarks.helpers", name, side, str(path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    krs: np.ndarray = np.load(path)
    return krs


def assert_refused(outcome: Outcome, *phrases: str) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr that says all of these."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    for phrase in phrases:
        assert phrase in line, f"{phrase!r} is not in {line!r}"


if __name__ == "__main__":
    contestant, padding, target = sys.argv[1:]
    assert padding in ("left", "right")
    np.save(target, krs_of(contestant, build_micro_case(padding)))  # type: ignore[arg-type]
