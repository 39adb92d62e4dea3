"""Stages before and after the training steps, for methods that are more than a loss.

`prepare` makes the training data (generic labels, generated answers); `finish` makes the final weights from the trained
ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """

    alternates: Sequence[Sequence[str]] | None = None
    forget: Sequence[Span] | None = None
    notes: dict[str, Any] | None = None


Prepare = Callable[[PreparationInputs, Any], PreparedData]
"""Make the training data from the inputs and the method's options."""

Finish = Callable[[PreTrainedModel, PreTrainedModel, Any], None]
"""Change the trained model's weights in place; arguments: trained model, reference model, the method's options."""
