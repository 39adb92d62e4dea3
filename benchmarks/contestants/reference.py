"""This toolkit's reference engine: one hooked forward pass per intervention."""

from collections.abc import Sequence

import torch

from benchmarks.contestants import Krs, Run, krs_table
from dissect.engine import find_engine
from dissect.engine.chunk import Chunk
from dissect.engine.layers import InMemory
from dissect.interventions import Intervention
from dissect.pairs import ModelPair
from dissect.prompts import Batch


def prepare(pair: ModelPair, interventions: Sequence[Intervention]) -> Run:
    """Look up the engine."""
    return engine_run("reference", pair, interventions, Chunk(tokens=0))  # which it does not read


def engine_run(name: str, pair: ModelPair, interventions: Sequence[Intervention], chunk: Chunk) -> Run:
    """The sweep of one of this toolkit's engines, over all batches together."""
    sweep = find_engine(name)
    layers = InMemory([pair.base, pair.unlearned])

    def run(batches: Sequence[Batch]) -> Krs:
        swept = sweep(layers, batches, interventions, chunk, lambda _share: None)
        tables = [
            krs_table(logits.base, logits.target, logits.intervened, batch)
            for batch, (logits,) in zip(batches, swept, strict=True)
        ]
        return torch.cat(tables, dim=1)

    return run
