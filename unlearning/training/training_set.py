"""What is trained on: tokenised examples with their constants, and the micro-batches of an optimizer step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from unlearning.data.batches import Span, collate, n_predicted
from unlearning.data.order import WindowPlan
from unlearning.methods.method import Batch, Window
from unlearning.training.references import References


@dataclass(frozen=True)
class TrainingSet(Dataset[WindowPlan]):
    """The tokenised data of a run.

    Attributes:
        forget, alternate, retain: the examples; empty where the method reads none.
        pairs: what an epoch is made of, as (place in forget, place in alternate), the latter -1 where there are no
            alternates; empty for a method that reads retain examples alone.
        references: the start model's constants.
    """

    forget: Sequence[Span]
    alternate: Sequence[Span]
    retain: Sequence[Span]
    pairs: Sequence[tuple[int, int]]
    references: References

    def __len__(self) -> int:
        return len(self.pairs) or len(self.retain)

    def __getitems__(self, plan: WindowPlan) -> WindowPlan:
        """The data loader's items are the plans themselves: batches are made when the step asks for them."""
        return plan

    def main_lengths(self) -> list[int]:
        """Tokens of each item of an epoch."""
        if not self.pairs:
            return [len(span.input_ids) for span in self.retain]
        return [
            len(self.forget[forget].input_ids) + (len(self.alternate[other].input_ids) if other >= 0 else 0)
            for forget, other in self.pairs
        ]

    def retain_lengths(self) -> list[int]:
        """Tokens of each retain example that forget examples are paired with."""
        return [len(span.input_ids) for span in self.retain] if self.pairs else []

    def window(self, plan: WindowPlan) -> Window:
        """The sizes of a whole step, over all processes."""
        forget, alternate = self._spans(plan.main)
        retain = [self.retain[place] for place in (plan.retain if self.pairs else plan.main)]
        return Window(
            forget_sequences=len(forget),
            forget_tokens=_tokens(forget),
            forget_positions=_positions(forget),
            alternate_sequences=len(alternate),
            alternate_tokens=_tokens(alternate),
            retain_sequences=len(retain) if self.retain else 0,
            retain_tokens=_tokens(retain),
            retain_positions=_positions(retain),
        )

    def forget_batches(
        self, plan: WindowPlan, window: Window, device: torch.device, statistic: float | None
    ) -> Iterator[tuple[Batch, list[int]]]:
        """This process's micro-batches of forget examples, with their places in the forget set.

        Where it has no share of the window the places are empty and the batch is one of another process: whoever runs
        it must count it for nothing.
        """
        if not self.pairs:
            return
        for items in plan.main_batches:
            used = items or plan.main[:1]
            places = [self.pairs[item][0] for item in used]
            others = [self.pairs[item][1] for item in used if self.pairs[item][1] >= 0]
            forget = collate([self.forget[place] for place in places]).to(device)
            forget = self.references.attach("forget", places, forget)
            alternate = None
            if others:
                alternate = collate([self.alternate[place] for place in others]).to(device)
                alternate = self.references.attach("alternate", others, alternate)
            yield Batch(window, forget=forget, alternate=alternate, statistic=statistic), places if items else []

    def retain_batches(
        self, plan: WindowPlan, window: Window, device: torch.device
    ) -> Iterator[tuple[Batch, list[int]]]:
        """This process's micro-batches of retain examples, likewise."""
        if not self.retain:
            return
        every, cut = (plan.retain, plan.retain_batches) if self.pairs else (plan.main, plan.main_batches)
        for items in cut:
            places = items or every[:1]
            batch = collate([self.retain[place] for place in places]).to(device)
            yield Batch(window, retain=self.references.attach("retain", places, batch)), items

    def _spans(self, items: Sequence[int]) -> tuple[list[Span], list[Span]]:
        if not self.pairs:
            return [], []
        pairs = [self.pairs[item] for item in items]
        forget = [self.forget[place] for place, _ in pairs]
        return forget, [self.alternate[other] for _, other in pairs if other >= 0]


def _tokens(spans: Sequence[Span]) -> int:
    return sum(n_predicted(span) for span in spans)


def _positions(spans: Sequence[Span]) -> int:
    return sum(len(span.input_ids) for span in spans)
