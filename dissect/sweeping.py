"""A planned sweep, run: pass by pass, kept as it goes, shared between processes, gone on with after a kill."""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from dissect.engine import Engine
from dissect.engine.chunk import Chunk, is_out_of_memory
from dissect.engine.layers import layers_of
from dissect.engine.plan import Pass, Plan
from dissect.interventions import Intervention
from dissect.pairs import Model
from dissect.processes import Processes
from dissect.progress import Progress
from dissect.prompts import Prompts
from dissect.runs import Run, peak_memory_bytes
from dissect.scoring import score_sweep
from dissect.sites import site_label
from unlearning.errors import InputError

Done = Mapping[tuple[str, int], set[tuple[str, int]]]
"""The site and centre of every intervention that is finished, by target and example."""


@dataclass(frozen=True, eq=False)
class Work:
    """One sweep.

    Attributes:
        engine: how it is run.
        base: the donor.
        targets: what is intervened on, by the name that the table gives it.
        prompts: what is asked.
        interventions: what is done.
    """

    engine: Engine
    base: Model
    targets: Mapping[str, Model]
    prompts: Prompts
    interventions: Sequence[Intervention]


def run_sweep(
    work: Work, plan: Plan, *, run: Run | None, processes: Processes, label: str, progress: bool
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Run every pass that is not finished yet.

    Returns:
        The whole results table (in every process), and what was measured on the way: `chunk_tokens` as it was in
        the end, `bytes_read` of streamed weights, `peak_memory_bytes` of the largest process.

    Raises:
        InputError: logits that are not finite, or no memory for even one copy.
    """
    kept = [frame for _, frame in run.parts()] if run is not None else []
    done = _done(kept)
    processes.wait()  # all have read what is kept before one writes more
    mine = processes.share([one for one in plan.passes if _pending(one, work, done)], lambda one: one.flops)
    chunk = Chunk(plan.chunk_tokens)
    frames: list[pd.DataFrame] = []
    bytes_read = 0
    with Progress(sum(one.flops for one in mine), label, show=progress and processes.rank == 0) as bar:
        for one in mine:
            bytes_read += _run_pass(one, work, done, chunk, run, frames, bar)
    measured = {"chunk_tokens": chunk.tokens, "bytes_read": bytes_read, **_peaks()}
    all_frames = processes.gather(frames)
    together = processes.gather([measured])
    frame = pd.concat([*kept, *all_frames], ignore_index=True)
    return in_order(frame, list(work.targets), work.interventions), {
        "chunk_tokens": min(one["chunk_tokens"] for one in together),
        "bytes_read": sum(one["bytes_read"] for one in together),
        **{key: max(one[key] for one in together) for key in _peaks()},
    }


def _run_pass(
    one: Pass, work: Work, done: Done, chunk: Chunk, run: Run | None, frames: list[pd.DataFrame], bar: Progress
) -> int:
    """Run what is pending of one pass, in smaller chunks where memory does not suffice; returns the bytes read."""
    while True:
        try:
            return _attempt(one, work, done, chunk, run, frames, bar)
        except (MemoryError, RuntimeError) as error:
            longest = max(batch.input_ids.shape[1] for batch in one.batches)
            if not is_out_of_memory(error):
                raise
            if chunk.tokens <= longest:
                raise InputError(
                    f"out of memory with {chunk.tokens} tokens at once, and the longest prompt has {longest}; shorten "
                    "it, or give a smaller --max-memory (the work is cut to it) or --stream"
                ) from None
            chunk.shrink(max(longest, chunk.tokens // 2))


def _attempt(
    one: Pass, work: Work, done: Done, chunk: Chunk, run: Run | None, frames: list[pd.DataFrame], bar: Progress
) -> int:
    pending = _pending(one, work, done)
    names = list(dict.fromkeys(name for name, _ in pending))
    indices = sorted({index for _, index in pending})
    interventions = [work.interventions[index] for index in indices]
    layers = layers_of([work.base, *(work.targets[name] for name in names)])
    sweeps = work.engine(layers, one.batches, interventions, chunk, lambda share: bar.advance(share * one.flops))
    for batch, by_target in zip(one.batches, sweeps, strict=True):
        for name, swept in zip(names, by_target, strict=True):
            rows = score_sweep(
                swept, work.prompts, batch, interventions, target=name, model_name=work.targets[name].name
            )
            frame = pd.DataFrame(rows)
            frames.append(frame)
            if run is not None:
                fingerprint = zlib.crc32(repr((batch.examples, indices)).encode())
                run.keep_part(f"{name}-{batch.examples[0]:05d}-{fingerprint:08x}", frame)
    return layers.bytes_read


def _done(frames: Sequence[pd.DataFrame]) -> Done:
    done: defaultdict[tuple[str, int], set[tuple[str, int]]] = defaultdict(set)
    for frame in frames:
        columns = (frame[name] for name in ("target", "example_index", "site", "centre"))
        for target, example, site, centre in zip(*columns, strict=True):
            done[target, example].add((site, centre))
    return done


def _pending(one: Pass, work: Work, done: Done) -> list[tuple[str, int]]:
    """The targets and interventions of a pass that some example of it still lacks."""
    examples = [example for batch in one.batches for example in batch.examples]
    return [
        (name, index)
        for name in work.targets
        for index in one.interventions
        if any(_key(work.interventions[index]) not in done.get((name, example), ()) for example in examples)
    ]


def _key(intervention: Intervention) -> tuple[str, int]:
    return site_label(intervention.sites), intervention.window.centre


def in_order(frame: pd.DataFrame, targets: Sequence[str], interventions: Sequence[Intervention]) -> pd.DataFrame:
    """The table by target, site, window and example, however the work was cut; each row once."""
    places = {_key(item): number for number, item in enumerate(interventions)}
    keys = pd.DataFrame(
        {
            "target": frame["target"].map(list(targets).index),
            "place": [places[key] for key in zip(frame["site"], frame["centre"], strict=True)],
            "example": frame["example_index"],
        }
    ).drop_duplicates()
    return frame.loc[keys.sort_values(["target", "place", "example"]).index].reset_index(drop=True)


def _peaks() -> dict[str, int]:
    peaks = {"peak_memory_bytes": peak_memory_bytes()}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
