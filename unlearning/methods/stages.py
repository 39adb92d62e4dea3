"""Stages before and after the training steps, for methods that are more than a loss.

`settle` chooses options from the data and the length of the run; `prepare` makes the training data (generic labels,
generated answers); `start` changes the weights before the first step; `finish` makes the final weights from the trained
ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.data.batches import Span
from unlearning.data.question_answer import Example
from unlearning.options import TrainOptions


@dataclass(frozen=True)
class PreparationInputs:
    """Inputs of a method's `prepare` stage.

    Attributes:
        model: The reference model (the model before training), in eval mode; `prepare` must not change it.
        tokenizer: The model's tokenizer.
        forget: The forget examples.
        alternates: Alternate answers to each forget prompt; None if the user gave none.
        max_length: Longest sequence in tokens; None for no limit.
        training: The trainer's options, for a stage that trains a model itself.
        batch_size: Sequences per batch.
        seed: Seed of every random draw.
        output_dir: Output directory of the run, where intermediate data can be kept; None if nothing is saved.
        progress: Show progress bars on stderr.
        train: Train another model. Takes a method's name, and `model`, `tokenizer`, `retain`, `progress` and options
            as `unlearning.train` does; returns the trained model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    forget: Sequence[Example]
    alternates: Sequence[Sequence[str]] | None
    max_length: int | None
    training: TrainOptions
    batch_size: int
    seed: int
    output_dir: Path | None
    progress: bool
    train: Callable[..., PreTrainedModel]


@dataclass(frozen=True)
class PreparedData:
    """Training data that a method made; None keeps what the user gave.

    Attributes:
        alternates: Alternate answers to each forget prompt.
        forget: The tokenised forget set.
        notes: Counts and remarks by name, stored in the run's record.
        said: Lines that a person reads before the first step.
    """

    alternates: Sequence[Sequence[str]] | None = None
    forget: Sequence[Span] | None = None
    notes: dict[str, Any] | None = None
    said: Sequence[str] = ()


Prepare = Callable[[PreparationInputs, Any], PreparedData]
"""Make the training data from the inputs and the method's options."""


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before its first step.

    Attributes:
        forget: The tokenised forget set.
        steps: Number of optimizer steps of the whole run.
        batch_size: Sequences per batch.
    """

    forget: Sequence[Span]
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Settled:
    """Options that a method settled before the first step.

    Attributes:
        options: The method's options, filled in.
        notes: Remarks by name, stored in the run's record.
        said: Lines that a person reads before the first step.
    """

    options: Any
    notes: dict[str, Any] = field(default_factory=dict)
    said: Sequence[str] = ()


Settle = Callable[[PreTrainedModel, RunFacts, Any], Settled]
"""Fill in options from the reference model, the facts of the run and the method's options."""

Start = Callable[[Sequence[tuple[str, Tensor]], Any], None]
"""Change the weights that train in place; arguments: their names and values, whole or sharded, and the method's
options. A resumed run takes them from its checkpoint instead."""

Finish = Callable[[PreTrainedModel, PreTrainedModel, Any], None]
"""Change the trained model's weights in place; arguments: trained model, reference model, the method's options."""
