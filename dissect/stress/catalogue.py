"""Which tests a verdict runs, by budget, and with what options.

`quick`, `standard` and `full` take about 1, 2 and 7 minutes on the built-in pair and two cores; a larger budget has
every test of a smaller one, asked of more facts or with more variants.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from dissect.prompts.prompts import Prompts
from dissect.stress.coefficient_scaling import coefficient_scaling
from dissect.stress.core.case import Case
from dissect.stress.core.result import StressResult
from dissect.stress.directions import oracle_direction, own_direction
from dissect.stress.expressed import expressed
from dissect.stress.interpolation import interpolation
from dissect.stress.lenses import logit_lens, tuned_lens
from dissect.stress.linear_probes import linear_probes
from dissect.stress.noise import activation_noise, weight_noise
from dissect.stress.pruning import prune_changed, prune_important
from dissect.stress.quantisation import quantisation
from dissect.stress.relearning import full_recipes, relearn_benign, relearn_disjoint, relearn_speed
from dissect.stress.rewording import rewording
from dissect.stress.sampling import sampling
from dissect.stress.sweeps import decomposition_sweep, patching_sweep, restoration_sweep
from dissect.stress.uds import unlearning_depth
from unlearning import Example

Budget = Literal["quick", "standard", "full"]
BUDGETS: tuple[Budget, ...] = ("quick", "standard", "full")

Run = Callable[[Case], StressResult]


SAMPLE: Mapping[Budget, int] = {"quick": 120, "standard": 240, "full": 400}
"""Forget facts at most, evenly spaced; and retain facts."""


@dataclass(frozen=True)
class Entry:
    """A test as the budgets run it.

    Attributes:
        name: of its result.
        runs: by budget; a budget that is not in it does not run the test.
        needs_retain: whether it cannot be run without retain questions.
        needs_never: whether it has nothing to be compared with without a never model.
    """

    name: str
    runs: Mapping[Budget, Run]
    needs_retain: bool = False
    needs_never: bool = False


def entries(paraphrases: Prompts | None, benign: Prompts | None = None) -> tuple[Entry, ...]:
    """All tests, the cheapest of each rung first.

    Args:
        paraphrases: other wordings of the forget questions, where there are some.
        benign: questions that have nothing to do with them, to train on.
    """
    texts = None if benign is None else [Example(item.prompt, item.answer) for item in benign.items]
    relearned = partial(relearn_benign, texts=texts)
    reworded = partial(rewording, paraphrases=paraphrases)
    return (
        Entry("expressed", _always(expressed)),
        Entry("logit_lens", _always(logit_lens)),
        Entry("uds", _always(unlearning_depth)),
        Entry("linear_probes", _always(linear_probes), needs_retain=True, needs_never=True),
        Entry("tuned_lens", _from_standard(tuned_lens), needs_retain=True, needs_never=True),
        Entry("relearn_speed", {"full": relearn_speed}, needs_never=True),
        Entry("patching", _from_standard(patching_sweep), needs_never=True),
        Entry("restoration", _from_standard(restoration_sweep), needs_never=True),
        Entry("decomposition", {"full": decomposition_sweep}, needs_never=True),
        Entry("oracle_direction", {"full": partial(oracle_direction, n_facts=120)}),
        Entry("interpolation", {"full": interpolation}, needs_never=True),
        Entry("own_direction", _sized(own_direction, 40, 80, 160), needs_retain=True),
        Entry("rewording", _without_quick(_sized(reworded, 40, 60, 120))),
        Entry("coefficient_scaling", _without_quick(_sized(coefficient_scaling, 40, 60, 120))),
        Entry("activation_noise", _without_quick(_sized(activation_noise, 40, 40, 120))),
        Entry("sampling", {"full": partial(sampling, n_facts=120)}),
        Entry(
            "relearn_disjoint",
            {"quick": relearn_disjoint, "standard": relearn_disjoint, "full": _thorough(relearn_disjoint)},
        ),
        Entry(
            "relearn_benign",
            {"quick": relearned, "standard": relearned, "full": _thorough(relearned)},
            needs_retain=benign is None,
        ),
        Entry("prune_changed", _always(prune_changed)),
        Entry("prune_important", {"full": prune_important}, needs_retain=True),
        Entry(
            "quantisation",
            {"quick": partial(quantisation, schemes=("nf4",)), "standard": quantisation, "full": quantisation},
        ),
        Entry("weight_noise", _without_quick(_sized(weight_noise, 40, 40, 120))),
    )


def _always(run: Run) -> dict[Budget, Run]:
    return dict.fromkeys(BUDGETS, run)


def _from_standard(run: Run) -> dict[Budget, Run]:
    return {"standard": run, "full": run}


def _sized(run: Callable[..., StressResult], quick: int, standard: int, full: int) -> dict[Budget, Run]:
    return {budget: partial(run, n_facts=n) for budget, n in zip(BUDGETS, (quick, standard, full), strict=True)}


def _without_quick(runs: Mapping[Budget, Run]) -> dict[Budget, Run]:
    return {budget: run for budget, run in runs.items() if budget != "quick"}


def _thorough(run: Callable[..., StressResult]) -> Run:
    """With every learning rate, full and of low rank: the worst case of all."""
    return lambda case: run(case, recipes=full_recipes(case.pair.base))


def selection(
    budget: Budget, case: Case, paraphrases: Prompts | None, benign: Prompts | None = None
) -> tuple[dict[str, Run], dict[str, str]]:
    """The tests of a budget that can be run on a case, and why the others cannot.

    Args:
        budget: one of `BUDGETS`.
        case: models and facts.
        paraphrases: other wordings of the forget questions.
        benign: see `entries`.
    """
    chosen: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for entry in entries(paraphrases, benign):
        if budget not in entry.runs:
            continue
        if entry.needs_retain and case.retain is None:
            left_out[entry.name] = "it needs retain questions (--retain)"
        elif entry.needs_never and case.never is None:
            left_out[entry.name] = "nothing tells what a model shows that never knew; give one (--never)"
        else:
            chosen[entry.name] = entry.runs[budget]
    return chosen, left_out
