"""A planned sweep, run: pass by pass, kept as it goes, shared between processes, gone on with after a kill."""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pandas as pd
import torch

from dissect.engine import Engine
from dissect.engine.chunk import Chunk, is_out_of_memory
from dissect.engine.layers import layers_of
from dissect.engine.plan import Pass, Plan
from dissect.interventions.arms import ArmGroup, ArmModels
from dissect.interventions.intervention import Intervention
from dissect.models.sites import site_label
from dissect.prompts.prompts import Prompts
from dissect.runtime.processes import Processes
from dissect.sweeps.rows import score_sweep
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.common.runs import Run, peak_memory_bytes

Key = tuple[str, str, int]
"""The site, kind of window and centre of an intervention."""
Done = Mapping[tuple[str, int], set[Key]]
"""What is finished, by arm and example."""


@dataclass(frozen=True, eq=False)
class Work:
    """One sweep.

    Attributes:
        engine: how it is run.
        arm_groups: the arms, those that share a walk together.
        prompts: what is asked.
        interventions: what is done.
    """

    engine: Engine
    arm_groups: Sequence[ArmGroup]
    prompts: Prompts
    interventions: Sequence[Intervention]

    @property
    def arms(self) -> list[str]:
        """The names of all arms, in order."""
        return [arm.name for group in self.arm_groups for arm in group.arms]


def run_sweep(
    work: Work, plans: Sequence[Plan], *, run: Run | None, processes: Processes, label: str, progress: bool
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Run every pass that is not finished yet.

    Args:
        work: the sweep.
        plans: one of each group.
        run: where finished batches are kept.
        processes: those that share the work.
        label: beside the progress bar.
        progress: whether there is one.

    Returns:
        The whole results table (in every process), and what was measured on the way: `chunk_tokens` as it was in
        the end, `bytes_read` of streamed weights, `peak_memory_bytes` of the largest process.

    Raises:
        InputError: logits that are not finite, or no memory for even one copy.
    """
    kept = [frame for _, frame in run.parts()] if run is not None else []
    done = _done(kept)
    processes.wait()  # all have read what is kept before one writes more
    pending = [
        (group, one)
        for group, plan in zip(work.arm_groups, plans, strict=True)
        for one in plan.passes
        if _pending(one, group, work, done)
    ]
    mine = processes.share(pending, lambda both: both[1].flops)
    chunk = Chunk(min(plan.chunk_tokens for plan in plans))
    frames: list[pd.DataFrame] = []
    bytes_read = 0
    with Progress(sum(one.flops for _, one in mine), label, show=progress and processes.rank == 0) as bar:
        for group, passes in groupby(mine, key=lambda both: both[0]):
            arm_models = group.load_models()
            for _, one in passes:
                bytes_read += _run_pass(one, group, arm_models, work, done, chunk, run, frames, bar)
            del arm_models  # before the next one's models are made
    measured = {"chunk_tokens": chunk.tokens, "bytes_read": bytes_read, **_peaks()}
    all_frames = processes.gather(frames)
    together = processes.gather([measured])
    frame = pd.concat([*kept, *all_frames], ignore_index=True)
    return in_order(frame, work.arms, work.interventions), {
        "chunk_tokens": min(one["chunk_tokens"] for one in together),
        "bytes_read": sum(one["bytes_read"] for one in together),
        **{key: max(one[key] for one in together) for key in _peaks()},
    }


def _run_pass(
    one: Pass,
    group: ArmGroup,
    arm_models: ArmModels,
    work: Work,
    done: Done,
    chunk: Chunk,
    run: Run | None,
    frames: list[pd.DataFrame],
    bar: Progress,
) -> int:
    """Run what is pending of one pass, in smaller chunks where memory does not suffice; returns the bytes read."""
    while True:
        try:
            return _attempt(one, group, arm_models, work, done, chunk, run, frames, bar)
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
    one: Pass,
    group: ArmGroup,
    arm_models: ArmModels,
    work: Work,
    done: Done,
    chunk: Chunk,
    run: Run | None,
    frames: list[pd.DataFrame],
    bar: Progress,
) -> int:
    pending = _pending(one, group, work, done)
    arms = [
        (arm, target) for arm, target in zip(group.arms, arm_models.targets, strict=True) if arm.name in dict(pending)
    ]
    indices = sorted({index for _, index in pending})
    interventions = [work.interventions[index] for index in indices]
    arm_models = replace(arm_models, targets=tuple(target for _, target in arms))
    layers = layers_of(arm_models.models)
    sweeps = work.engine(
        layers, one.batches, interventions, arm_models.donor, chunk, lambda share: bar.advance(share * one.flops)
    )
    for batch, by_target in zip(one.batches, sweeps, strict=True):
        for (arm, model), swept in zip(arms, by_target, strict=True):
            rows = score_sweep(swept, work.prompts, batch, interventions, arm=arm, model_name=model.name)
            frame = pd.DataFrame(rows)
            frames.append(frame)
            if run is not None:
                fingerprint = zlib.crc32(repr((batch.examples, indices)).encode())
                run.keep_part(f"{arm.name}-{batch.examples[0]:05d}-{fingerprint:08x}", frame)
    return layers.bytes_read


def _done(frames: Sequence[pd.DataFrame]) -> Done:
    done: defaultdict[tuple[str, int], set[Key]] = defaultdict(set)
    for frame in frames:
        columns = (frame[name] for name in ("arm", "example_index", "site", "window", "centre"))
        for arm, example, *key in zip(*columns, strict=True):
            done[arm, example].add(tuple(key))
    return done


def _pending(one: Pass, group: ArmGroup, work: Work, done: Done) -> list[tuple[str, int]]:
    """The arms and interventions of a pass that some example of it still lacks."""
    examples = [example for batch in one.batches for example in batch.examples]
    return [
        (arm.name, index)
        for arm in group.arms
        for index in one.interventions
        if any(_key(work.interventions[index]) not in done.get((arm.name, example), ()) for example in examples)
    ]


def _key(intervention: Intervention) -> Key:
    return site_label(intervention.sites), intervention.window.kind, intervention.window.centre


def in_order(frame: pd.DataFrame, arms: Sequence[str], interventions: Sequence[Intervention]) -> pd.DataFrame:
    """The table by arm, site, window and example, however the work was cut; each row once."""
    places = {_key(item): number for number, item in enumerate(interventions)}
    columns = (frame[name] for name in ("site", "window", "centre"))
    keys = pd.DataFrame(
        {
            "arm": frame["arm"].map(list(arms).index),
            "place": [places[key] for key in zip(*columns, strict=True)],
            "example": frame["example_index"],
        }
    ).drop_duplicates()
    return frame.loc[keys.sort_values(["arm", "place", "example"]).index].reset_index(drop=True)


def _peaks() -> dict[str, int]:
    peaks = {"peak_memory_bytes": peak_memory_bytes()}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
