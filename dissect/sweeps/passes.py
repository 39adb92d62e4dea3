"""Run a planned sweep pass by pass: finished batches are kept, processes share the work, and a killed run resumes."""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import pandas as pd
import torch

from dissect.engine import Engine
from dissect.engine.chunk import Chunk
from dissect.engine.layers import layers_of
from dissect.engine.plan import Pass, Plan
from dissect.interventions.arms import ArmGroup, ArmModels
from dissect.interventions.intervention import Intervention
from dissect.models.sites import site_label
from dissect.prompts.prompts import Prompts
from dissect.runtime.memory import is_out_of_memory
from dissect.runtime.processes import Processes
from dissect.sweeps.rows import score_sweep
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress
from unlearning.common.runs import Run, peak_memory_bytes

Key = tuple[str, str, int]
"""The site, kind of window and centre of an intervention."""
Done = Mapping[tuple[str, int], set[Key]]
"""The finished interventions, by arm and example."""


@dataclass(frozen=True, eq=False)
class Work:
    """One sweep.

    Attributes:
        engine: The engine that runs it.
        arm_groups: The arms, grouped by what shares forward passes.
        prompts: The prompts.
        interventions: The interventions.
    """

    engine: Engine
    arm_groups: Sequence[ArmGroup]
    prompts: Prompts
    interventions: Sequence[Intervention]

    @property
    def arms(self) -> list[str]:
        """Names of all arms, in order."""
        return [arm.name for group in self.arm_groups for arm in group.arms]


def run_sweep(
    work: Work, plans: Sequence[Plan], *, run: Run | None, processes: Processes, label: str, progress: bool
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Run every pass that is not finished yet.

    Args:
        work: The sweep.
        plans: One plan per group of arms.
        run: The run directory that keeps finished batches, if any.
        processes: The processes that share the work.
        label: Label of the progress bar.
        progress: Show a progress bar.

    Returns:
        The whole results table (in every process), and what the sweep measured of itself: the final `chunk_tokens`,
        `bytes_read` of streamed weights, `peak_memory_bytes` of the largest process.

    Raises:
        InputError: Logits are not finite, or memory does not suffice for the longest prompt.
    """
    kept = [frame for _, frame in run.parts()] if run is not None else []
    done = _done(kept)
    processes.wait()  # no process may write before all have read
    pending = [
        (group, one)
        for group, plan in zip(work.arm_groups, plans, strict=True)
        for one in plan.passes
        if _pending(one, group, work, done)
    ]
    mine = processes.share(pending, lambda both: both[1].flops)
    chunk = Chunk(min(plan.chunk_tokens for plan in plans))
    bytes_read = 0
    with Progress(sum(one.flops for _, one in mine), label, show=progress and processes.rank == 0) as bar:
        execution = _Execution(work, done, chunk, run, bar)
        for group, passes in groupby(mine, key=lambda both: both[0]):
            models = group.load_models()
            for _, one in passes:
                bytes_read += execution.run_pass(one, group, models)
            del models  # frees memory before the next group's models are built
    measured = {"chunk_tokens": chunk.tokens, "bytes_read": bytes_read, **_peaks()}
    all_frames = processes.gather(execution.frames)
    together = processes.gather([measured])
    frame = pd.concat([*kept, *all_frames], ignore_index=True)
    return in_order(frame, work.arms, work.interventions), {
        "chunk_tokens": min(one["chunk_tokens"] for one in together),
        "bytes_read": sum(one["bytes_read"] for one in together),
        **{key: max(one[key] for one in together) for key in _peaks()},
    }


@dataclass(eq=False)
class _Execution:
    """The execution of a sweep in one process.

    Attributes:
        work: The sweep.
        done: What was finished before.
        chunk: The number of tokens that go through a block together; shrinks when memory runs out.
        run: The run directory that keeps finished batches, if any.
        bar: The progress bar.
        frames: Rows of the batches that this process has finished.
    """

    work: Work
    done: Done
    chunk: Chunk
    run: Run | None
    bar: Progress
    frames: list[pd.DataFrame] = field(default_factory=list)

    def run_pass(self, one: Pass, group: ArmGroup, models: ArmModels) -> int:
        """Compute what is pending of one pass, in smaller chunks where memory does not suffice.

        Args:
            one: The pass.
            group: The arms that it is run for.
            models: Their models.

        Returns:
            The number of bytes of streamed weights that were read.

        Raises:
            InputError: Logits are not finite, or memory does not suffice for the longest prompt.
        """
        while True:
            try:
                return self._attempt(one, group, models)
            except (MemoryError, RuntimeError) as error:
                longest = max(batch.input_ids.shape[1] for batch in one.batches)
                if not is_out_of_memory(error):
                    raise
                if self.chunk.tokens <= longest:
                    raise InputError(
                        f"out of memory with {self.chunk.tokens} tokens at once, and the longest prompt has {longest}; "
                        "shorten it, give a smaller `max_memory` (the work is split to fit), or turn `stream` on"
                    ) from None
                self.chunk.shrink(max(longest, self.chunk.tokens // 2))

    def _attempt(self, one: Pass, group: ArmGroup, models: ArmModels) -> int:
        pending = _pending(one, group, self.work, self.done)
        arms = [
            (arm, target) for arm, target in zip(group.arms, models.targets, strict=True) if arm.name in dict(pending)
        ]
        indices = sorted({index for _, index in pending})
        interventions = [self.work.interventions[index] for index in indices]
        models = replace(models, targets=tuple(target for _, target in arms))
        layers = layers_of(models.models)

        def advance(share: float) -> None:
            self.bar.advance(share * one.flops)

        sweeps = self.work.engine(layers, one.batches, interventions, models.donor, self.chunk, advance)
        for batch, by_target in zip(one.batches, sweeps, strict=True):
            for (arm, model), swept in zip(arms, by_target, strict=True):
                rows = score_sweep(swept, self.work.prompts, batch, interventions, arm=arm, model_name=model.name)
                frame = pd.DataFrame(rows)
                self.frames.append(frame)
                if self.run is not None:
                    fingerprint = zlib.crc32(repr((batch.examples, indices)).encode())
                    self.run.keep_part(f"{arm.name}-{batch.examples[0]:05d}-{fingerprint:08x}", frame)
        return layers.bytes_read


def _done(frames: Sequence[pd.DataFrame]) -> Done:
    done: defaultdict[tuple[str, int], set[Key]] = defaultdict(set)
    for frame in frames:
        columns = (frame[name] for name in ("arm", "example_index", "site", "window", "centre"))
        for arm, example, *key in zip(*columns, strict=True):
            done[arm, example].add(tuple(key))
    return done


def _pending(one: Pass, group: ArmGroup, work: Work, done: Done) -> list[tuple[str, int]]:
    """Return the arms and interventions of a pass that at least one of its examples lacks."""
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
    """Order a table by arm, intervention and example, however the work was split, and drop duplicates.

    Args:
        frame: Rows in any order.
        arms: Names of the arms, in order.
        interventions: The interventions, in order.

    Returns:
        The ordered table, each row once.
    """
    numbers = {_key(item): number for number, item in enumerate(interventions)}
    columns = (frame[name] for name in ("site", "window", "centre"))
    keys = pd.DataFrame(
        {
            "arm": frame["arm"].map(list(arms).index),
            "intervention": [numbers[key] for key in zip(*columns, strict=True)],
            "example": frame["example_index"],
        }
    ).drop_duplicates()
    return frame.loc[keys.sort_values(["arm", "intervention", "example"]).index].reset_index(drop=True)


def _peaks() -> dict[str, int]:
    peaks = {"peak_memory_bytes": peak_memory_bytes()}
    if torch.cuda.is_available():
        peaks["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peaks
