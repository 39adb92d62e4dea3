"""The training data: tokenised examples with their reference quantities, and the micro-batches of a step batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch.utils.data import Dataset

from unlearning.data.batches import Span, collate, n_predicted
from unlearning.data.order import StepPlan, StepSampler
from unlearning.methods.method import Batch, StepBatch
from unlearning.training.references import References


@dataclass(frozen=True)
class TrainingSet(Dataset[StepPlan]):
    """The tokenised data of a run.

    Attributes:
        forget: Forget examples; empty if the method reads none.
        alternate: Alternate answers to the forget prompts; empty if the method reads none.
        retain: Retain examples; empty if the method trains on none.
        pairs: Items of an epoch, as (index into `forget`, index into `alternate`). The second index is -1 for a method
            without alternates. Empty for a method that reads retain examples alone; its items are those of `retain`.
        references: Quantities of the reference model.
    """

    forget: Sequence[Span]
    alternate: Sequence[Span]
    retain: Sequence[Span]
    pairs: Sequence[tuple[int, int]]
    references: References

    def __len__(self) -> int:
        """Return the number of items of an epoch."""
        return len(self.pairs) or len(self.retain)

    def __getitems__(self, plan: StepPlan) -> StepPlan:
        """Return the plan itself: micro-batches are collated when the training step asks for them."""
        return plan

    def main_lengths(self) -> list[int]:
        """Return the number of tokens of each item of an epoch."""
        if not self.pairs:
            return [len(span.input_ids) for span in self.retain]
        return [
            len(self.forget[forget].input_ids) + (len(self.alternate[other].input_ids) if other >= 0 else 0)
            for forget, other in self.pairs
        ]

    def retain_lengths(self) -> list[int]:
        """Return the number of tokens of each retain example; empty if there are no forget examples to pair it with."""
        return [len(span.input_ids) for span in self.retain] if self.pairs else []

    def step_batch(self, plan: StepPlan, *, progress: float = 0.0) -> StepBatch:
        """Return the sizes of a whole step batch, over all processes, and how far the run is."""
        forget, alternate = self._spans(plan.main)
        retain = [self.retain[index] for index in (plan.retain if self.pairs else plan.main)]
        return StepBatch(
            forget_sequences=len(forget),
            forget_tokens=_n_answer_tokens(forget),
            forget_positions=_n_tokens(forget),
            alternate_sequences=len(alternate),
            alternate_tokens=_n_answer_tokens(alternate),
            retain_sequences=len(retain) if self.retain else 0,
            retain_tokens=_n_answer_tokens(retain),
            retain_positions=_n_tokens(retain),
            progress=progress,
        )

    def read(self, *, seed: int, step_batch_size: int, n_steps: int) -> dict[str, list[int]]:
        """Return which examples the first steps of a run read, on all processes together.

        Args:
            seed: Random seed of the order.
            step_batch_size: Items of an epoch per optimizer step, on all processes.
            n_steps: Number of optimizer steps.

        Returns:
            Indices in ascending order, by the name of the data set ("forget", "alternate" or "retain").
        """
        items, retain = set(), set()
        sampler = StepSampler(
            self.main_lengths(),
            self.retain_lengths(),
            seed=seed,
            batch_size=step_batch_size,
            step_batch_size=step_batch_size,
        )
        for epoch in range(math.ceil(n_steps / len(sampler))):
            sampler.set_epoch(epoch)
            for plan in islice(sampler, n_steps - epoch * len(sampler)):
                items.update(plan.main)
                retain.update(plan.retain)
            if len(items) == len(self) and len(retain) == len(self.retain_lengths()):
                break
        if not self.pairs:
            return {"forget": [], "alternate": [], "retain": sorted(items)}
        pairs = [self.pairs[item] for item in items]
        others = {other for _, other in pairs if other >= 0}
        return {"forget": sorted({index for index, _ in pairs}), "alternate": sorted(others), "retain": sorted(retain)}

    def forget_batches(
        self, plan: StepPlan, step_batch: StepBatch, device: torch.device, statistic: float | None
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Yield this process's micro-batches of forget examples.

        A process without a share of the step batch still gets a micro-batch, so that it takes part in the collective
        operations of the others. Its indices are empty, and the caller must give its loss the weight 0.

        Args:
            plan: Examples of the step.
            step_batch: Sizes of the whole step batch.
            device: Device of the tensors.
            statistic: Value of `Method.statistic` over the step batch; None if the method has none of forget examples.

        Yields:
            A micro-batch, and the indices of its examples in the forget set.
        """
        if not self.pairs:
            return
        for items in plan.main_batches:
            pairs = [self.pairs[item] for item in items or plan.main[:1]]
            indices = [index for index, _ in pairs] if items else []
            # Built in a call, so that no variable here keeps the batch alive during its backward pass.
            yield self._forget_batch(pairs, step_batch, device, statistic), indices

    def retain_batches(
        self, plan: StepPlan, step_batch: StepBatch, device: torch.device, statistic: float | None
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Yield this process's micro-batches of retain examples (see `forget_batches`).

        Args:
            plan: Examples of the step.
            step_batch: Sizes of the whole step batch.
            device: Device of the tensors.
            statistic: Value of `Method.statistic` over the step batch; None if the method has none of retain examples.

        Yields:
            A micro-batch, and the indices of its examples in the retain set.
        """
        if not self.retain:
            return
        every, cut = (plan.retain, plan.retain_batches) if self.pairs else (plan.main, plan.main_batches)
        for items in cut:
            yield self._retain_batch(items or every[:1], step_batch, device, statistic), items

    def _forget_batch(
        self, pairs: Sequence[tuple[int, int]], step_batch: StepBatch, device: torch.device, statistic: float | None
    ) -> Batch:
        indices = [index for index, _ in pairs]
        others = [index for _, index in pairs if index >= 0]
        forget = replace(collate([self.forget[i] for i in indices]), index=torch.tensor(indices)).to(device)
        forget = self.references.attach("forget", indices, forget)
        alternate = None
        if others:
            alternate = collate([self.alternate[index] for index in others]).to(device)
            alternate = self.references.attach("alternate", others, alternate)
        return Batch(step_batch, forget=forget, alternate=alternate, statistic=statistic)

    def _retain_batch(
        self, indices: Sequence[int], step_batch: StepBatch, device: torch.device, statistic: float | None
    ) -> Batch:
        batch = collate([self.retain[index] for index in indices]).to(device)
        return Batch(step_batch, retain=self.references.attach("retain", indices, batch), statistic=statistic)

    def _spans(self, items: Sequence[int]) -> tuple[list[Span], list[Span]]:
        if not self.pairs:
            return [], []
        pairs = [self.pairs[item] for item in items]
        forget = [self.forget[index] for index, _ in pairs]
        return forget, [self.alternate[index] for _, index in pairs if index >= 0]


def _n_answer_tokens(spans: Sequence[Span]) -> int:
    return sum(n_predicted(span) for span in spans)


def _n_tokens(spans: Sequence[Span]) -> int:
    return sum(len(span.input_ids) for span in spans)
