"""Run every test on every judged model, and keep the values that verdicts are made of.

OUT/tests/FAMILY/MODEL/*.parquet        one table per test, and tests.json with everything else
OUT/rewritten/FAMILY/MODEL/             the same of the models written otherwise
OUT/tests/FAMILY/base-and-never-HASH/   results of base and control, once for all models of the family
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.verdict_benchmark.families import TRUTH, Family
from dissect.models.model import Model, load_model
from dissect.models.pair import ModelPair
from dissect.models.rewriting import rewritten
from dissect.prompts.loading import load_prompts
from dissect.prompts.prompts import Prompts
from dissect.stress.catalogue import entries
from dissect.stress.core.canonical_case import in_canonical_form
from dissect.stress.core.case import Case, make_case
from dissect.stress.core.result import StressResult
from dissect.stress.core.sharing import attacked
from dissect.stress.core.storage import as_parts, as_record, from_parts
from dissect.stress.crossover import crossover
from dissect.stress.deranged import deranged_relearning
from dissect.stress.directions import own_direction
from dissect.stress.geometry import geometry
from dissect.stress.lenses import logit_lens
from dissect.stress.linear_probes import linear_probes
from dissect.stress.pruning import prune_changed
from dissect.stress.quantisation import quantisation
from dissect.stress.relearning import relearn_benign, relearn_disjoint
from dissect.stress.rewording import rewording
from dissect.stress.sweeps import patching_sweep, restoration_sweep
from dissect.stress.uds import unlearning_depth
from dissect.stress.without_attack import without_attack
from dissect.zoo.world import write_records
from unlearning.common.errors import InputError
from unlearning.common.runs import write_frame, write_json

RECORD = "tests.json"

OF_VERDICT = (
    "without_attack",
    "logit_lens",
    "linear_probes",
    "relearn_disjoint",
    "relearn_benign",
    "deranged_relearning",
)
"""The tests that labels are made of: those of the rules, and those of the first evidence levels in every budget."""

TESTED, REWRITTEN = "tests", "rewritten"
"""Directories of the results: of the models as they are, and of the same models written otherwise."""


class Examiner:
    """Base, control and questions of a family, loaded once.

    Args:
        family: The family whose models are judged.
        out: Directory of the benchmark.
    """

    def __init__(self, family: Family, out: Path) -> None:
        self.family = family
        self.out, self.rewritten = (out / kept / family.name for kept in (TESTED, REWRITTEN))
        folder = family.path / "questions"
        write_records(family.world, folder)
        self.base, self.control = (load_model(family.path / name) for name in ("base", "never"))
        self._prompts = {
            name: load_prompts(folder / f"{name}.jsonl", self.base.tokenizer)
            for name in ("forget", "retain", "forget_paraphrased")
        }
        self._case: Case | None = None
        configuration = json.dumps(family.fingerprint(), sort_keys=True)
        self._ground = self.out / f"base-and-never-{hashlib.sha256(configuration.encode()).hexdigest()[:12]}"

    def case(self, unlearned: Model) -> Case:
        """Return the case of one model in canonical form; distractors are found only once."""
        pair = ModelPair(self.base, unlearned)
        if self._case is None:
            forget, retain = self._prompts["forget"], self._prompts["retain"]
            self._case = make_case(pair, forget, retain=retain, control=self.control)
        return in_canonical_form(replace(self._case, pair=pair)).case

    def examine(self, name: str, only: Sequence[str] | None = None, *, is_rewritten: bool = False) -> None:
        """Run the tests of a model that were not run before, and keep their results.

        Args:
            name: Name of the model.
            only: Names of the tests to run; all of `battery` by default.
            is_rewritten: Whether to write the model otherwise first, at random, without changing its outputs
                (`dissect.models.rewriting`). Base and control stay as they are.

        Raises:
            InputError: The directory holds tests of another model of that name.
        """
        folder = (self.rewritten if is_rewritten else self.out) / name
        truth = json.loads((self.family.path / name / TRUTH).read_text(encoding="utf-8"))["configuration"]
        record: dict[str, Any] = read_tests(folder) or {"configuration": truth, "tests": {}, "cka": None}
        if record["configuration"] != truth:
            raise InputError(f"{folder}: holds tests of another model. Remove it, or give another `out`")
        tests = battery(self._prompts["forget_paraphrased"])
        pending = [test for test in tests if test not in record["tests"] and (only is None or test in only)]
        finished = only is not None or record["cka"] is not None
        if not pending and finished:
            return
        model = load_model(self.family.path / name)
        if is_rewritten:
            model = rewritten(model, seed=int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        case = self.case(model)
        comparing = {entry.name for entry in entries(None) if entry.compares_models}
        for test in pending:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = attacked(test, tests[test], case, self._ground, compares_models=test in comparing)
                except InputError as error:
                    record["tests"][test] = {"failed": str(error)}
                    write_json(folder / RECORD, record)
                    continue
            parts = as_parts(found)
            for part, frame in parts.items():
                write_frame(folder / f"{part}.parquet", frame)
            record["tests"][test] = {**as_record(found), "parts": list(parts)}
            write_json(folder / RECORD, record)
        if not finished:
            record["cka"] = geometry(case).erasure
            write_json(folder / RECORD, record)


def read_tests(folder: Path) -> dict[str, Any] | None:
    """Return the record of a model's tests; None if no test was run."""
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def read_results(folder: Path) -> dict[str, StressResult]:
    """Return the results of a model's tests by name, without tests that failed."""
    record = read_tests(folder)
    results = {}
    for said in (record["tests"] if record else {}).values():
        if "failed" not in said:
            parts = {part: pd.read_parquet(folder / f"{part}.parquet") for part in said["parts"]}
            found = from_parts(said, parts)
            results[found.test] = found
    return results


def battery(paraphrases: Prompts) -> Mapping[str, Callable[[Case], StressResult]]:
    """Return the tests that every model goes through, of all evidence levels: those that the rule may use, and rivals.

    Args:
        paraphrases: Paraphrases of the forget questions.

    Returns:
        The tests by name.
    """
    return {
        "without_attack": without_attack,
        "logit_lens": logit_lens,
        "uds": unlearning_depth,
        "linear_probes": linear_probes,
        "patching": patching_sweep,
        "restoration": restoration_sweep,
        "own_direction": partial(own_direction, limit=80),
        "rewording": partial(rewording, paraphrases=paraphrases),
        "relearn_disjoint": relearn_disjoint,
        "relearn_benign": relearn_benign,
        "deranged_relearning": deranged_relearning,
        "crossover": crossover,
        "prune_changed": prune_changed,
        "quantisation": partial(quantisation, schemes=("nf4",)),
    }
