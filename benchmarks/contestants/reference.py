"""This toolkit's reference engine: one hooked forward pass per intervention."""

from collections.abc import Sequence

from benchmarks.contestants import Krs, Run, batch_by_batch, krs_table
from dissect.engine import find_engine
from dissect.engine.chunk import Chunk
from dissect.engine.layers import InMemory
from dissect.interventions.donors import own_activations
from dissect.interventions.intervention import Intervention
from dissect.models.pair import ModelPair
from dissect.prompts.prompts import Batch


def prepare(pair: ModelPair, interventions: Sequence[Intervention]) -> Run:
    """Look up the engine."""
    return engine_run("reference", pair, interventions, Chunk(tokens=1))  # of which it makes no use


def engine_run(name: str, pair: ModelPair, interventions: Sequence[Intervention], chunk: Chunk) -> Run:
    """Return the sweep of one of this toolkit's engines, one pass per batch, as `patch` plans it if memory is ample."""
    sweep = find_engine(name)
    layers, donor = InMemory([pair.base, pair.unlearned]), own_activations(pair.base)

    @batch_by_batch
    def run(batch: Batch) -> Krs:
        ((logits,),) = sweep(layers, [batch], interventions, donor, chunk, lambda _share: None)
        return krs_table(logits.base, logits.target, logits.intervened, batch)

    return run
