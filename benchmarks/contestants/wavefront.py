"""This toolkit: every intervention in one pass over the layers of both models."""

from collections.abc import Sequence

from benchmarks.case import Case
from benchmarks.contestants import Krs, Run
from benchmarks.contestants.reference import engine_run
from dissect.engine.chunk import Chunk
from dissect.engine.costs import costs_of, pass_flops
from dissect.engine.plan import measure_chunk
from dissect.engine.schedule import make_schedule
from dissect.interventions.intervention import Intervention
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch


def prepare(pair: ModelPair, interventions: Sequence[Intervention]) -> Run:
    """Nothing: the chunk size is calibrated in the first sweep, which is the warm-up of a race."""
    calibrated: list[Run] = []

    def run(batches: Sequence[Batch]) -> Krs:
        batches = _as_planned(batches)
        if not calibrated:
            chunk = Chunk(measure_chunk(pair.unlearned, batches[0], costs_of(pair.base)))
            calibrated.append(engine_run("wavefront", pair, interventions, chunk))
        return calibrated[0](batches)

    return run


def planned_flops(case: Case) -> int:
    """Operations of the sweep, counted from its schedule."""
    costs = costs_of(case.pair.base)
    schedule = make_schedule(case.interventions, case.pair.n_layers)
    return sum(pass_flops(schedule, costs, batch, n_targets=1) for batch in _as_planned(case.batches))


def _as_planned(batches: Sequence[Batch]) -> list[Batch]:
    """Cut the batches as `dissect.engine.plan` does when memory is ample: nothing after the last scored column."""
    return [batch.trimmed() for batch in batches]
