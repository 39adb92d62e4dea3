"""The stress tests by budget, with their options. Add a new test here.

`quick`, `standard` and `full` take about 1, 2 and 7 minutes on the built-in pair and two cores. A larger budget runs
every test of a smaller one, on more facts or with more variants.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from dissect.prompts.prompts import Prompts
from dissect.stress.coefficient_scaling import coefficient_scaling
from dissect.stress.core.case import Case
from dissect.stress.core.result import StressResult
from dissect.stress.crossover import crossover
from dissect.stress.deranged import deranged_relearning
from dissect.stress.directions import oracle_direction, own_direction
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
from dissect.stress.without_attack import without_attack
from unlearning import Example

Budget = Literal["quick", "standard", "full"]
BUDGETS: tuple[Budget, ...] = ("quick", "standard", "full")

Run = Callable[[Case], StressResult]


SAMPLE: Mapping[Budget, int] = {"quick": 120, "standard": 240, "full": 400}
"""Maximum number of forget facts, and of retain facts, by budget; the facts are evenly spaced."""


@dataclass(frozen=True)
class Entry:
    """A test as the budgets run it.

    Attributes:
        name: Name of the test's result.
        runs: The test with its options, by budget; a budget without an entry does not run the test.
        needs_retain: Whether the test needs retain questions.
        needs_control: Whether the test has no floor without a control.
        replaces_control: Whether the test is one that does without a control. With one, `quick` does not run it.
        compares_models: Whether the values for one model depend on another model than the base. Such a test is run on
            all models every time; with False, `shared` keeps its values for base and control and uses them again. The
            default is True, because a test that is wrongly marked as independent would give wrong values. It is True
            also for tests that search a strength that takes hold on all models; these keep values by themselves.
    """

    name: str
    runs: Mapping[Budget, Run]
    needs_retain: bool = False
    needs_control: bool = False
    replaces_control: bool = False
    compares_models: bool = True


def entries(paraphrases: Prompts | None, general: Prompts | None = None) -> tuple[Entry, ...]:
    """Return all tests, the cheapest of each evidence level first.

    Args:
        paraphrases: Other wordings of the forget questions; None if there are none.
        general: General questions to fine-tune on; None takes the retain questions.

    Returns:
        One entry per test.
    """
    texts = None if general is None else [Example(item.prompt, item.answer) for item in general.items]
    relearned = partial(relearn_benign, texts=texts)
    reworded = partial(rewording, paraphrases=paraphrases)
    independent = partial(Entry, compares_models=False)
    comparing = partial(Entry, compares_models=True)
    return (
        independent("without_attack", _always(without_attack)),
        independent("logit_lens", _always(logit_lens)),
        comparing("uds", _always(unlearning_depth)),
        comparing("linear_probes", _always(linear_probes), needs_retain=True, needs_control=True),
        comparing("tuned_lens", _from_standard(tuned_lens), needs_retain=True, needs_control=True),
        comparing("relearn_speed", {"full": relearn_speed}, needs_control=True),
        independent("crossover", {"full": crossover}),
        comparing("patching", _from_standard(patching_sweep), needs_control=True),
        comparing("restoration", _from_standard(restoration_sweep), needs_control=True),
        comparing("decomposition", {"full": decomposition_sweep}, needs_control=True),
        independent("oracle_direction", {"full": partial(oracle_direction, limit=120)}),
        independent("interpolation", {"full": interpolation}, needs_control=True),
        independent("own_direction", _sized(own_direction, 40, 80, 160), needs_retain=True),
        independent("rewording", _without_quick(_sized(reworded, 40, 60, 120))),
        independent("coefficient_scaling", _without_quick(_sized(coefficient_scaling, 40, 60, 120))),
        independent("activation_noise", _without_quick(_sized(activation_noise, 40, 40, 120))),
        independent("sampling", {"full": partial(sampling, limit=120)}),
        comparing(
            "relearn_disjoint",
            {
                "quick": relearn_disjoint,
                "standard": relearn_disjoint,
                "full": partial(relearn_disjoint, recipes=full_recipes(), wordings=paraphrases),
            },
        ),
        comparing(
            "relearn_benign",
            {"quick": relearned, "standard": relearned, "full": partial(relearned, recipes=full_recipes())},
            needs_retain=general is None,
        ),
        comparing("deranged_relearning", _always(deranged_relearning), replaces_control=True),
        independent("prune_changed", _always(prune_changed)),
        independent("prune_important", {"full": prune_important}, needs_retain=True),
        independent(
            "quantisation",
            {"quick": partial(quantisation, schemes=("nf4",)), "standard": quantisation, "full": quantisation},
        ),
        independent("weight_noise", _without_quick(_sized(weight_noise, 40, 40, 120))),
        independent("quantisation_as_written", _without_quick(_always(_as_written(quantisation)))),
        independent("weight_noise_as_written", {"full": _as_written(partial(weight_noise, limit=120))}),
    )


def _always(run: Run) -> dict[Budget, Run]:
    """Return the test for every budget."""
    return dict.fromkeys(BUDGETS, run)


def _from_standard(run: Run) -> dict[Budget, Run]:
    return {"standard": run, "full": run}


def _sized(run: Callable[..., StressResult], quick: int, standard: int, full: int) -> dict[Budget, Run]:
    return {budget: partial(run, limit=n) for budget, n in zip(BUDGETS, (quick, standard, full), strict=True)}


def _without_quick(runs: Mapping[Budget, Run]) -> dict[Budget, Run]:
    return {budget: run for budget, run in runs.items() if budget != "quick"}


def _as_written(run: Run) -> Run:
    """Return a test that runs on the models as they were given, not on their canonical forms.

    Rounding and noise are about weights as somebody wrote them, and a rewriting changes what they do. So the test with
    the plain name runs on canonical forms, and this one tells what a user of these very files would see.
    """

    def test(case: Case) -> StressResult:
        found = run(case.as_written)
        return replace(
            found, test=f"{found.test}_as_written", proves=f"On the weights as they were given. {found.proves}"
        )

    return test


def selection(
    budget: Budget, case: Case, paraphrases: Prompts | None, general: Prompts | None = None
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Choose the tests of a budget that can be run on a case.

    Args:
        budget: One of `BUDGETS`.
        case: Models and facts.
        paraphrases: Other wordings of the forget questions; None if there are none.
        general: General questions to fine-tune on; None takes the retain questions.

    Returns:
        The chosen tests by name, and the reason by name for each test of the budget that cannot be run.
    """
    chosen: dict[str, Entry] = {}
    left_out: dict[str, str] = {}
    for entry in entries(paraphrases, general):
        if budget not in entry.runs:
            continue
        if entry.needs_retain and case.retain is None:
            left_out[entry.name] = "it needs retain questions"
        elif entry.needs_control and case.control is None:
            left_out[entry.name] = "it needs a control, because no floor is known without one"
        elif entry.replaces_control and budget == "quick" and case.control is not None:
            left_out[entry.name] = "it is for cases without a control; larger budgets run it in all cases"
        else:
            chosen[entry.name] = entry
    return chosen, left_out
