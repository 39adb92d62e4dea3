"""What comes before and after the steps of a method that is more than a loss: inputs made, weights made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.data.batches import Span
from unlearning.data.question_answer import Example
from unlearning.options import TrainOptions


@dataclass(frozen=True)
class Start:
    """What a method's own preparation may read.

    Attributes:
        model: the start model, in eval mode, which must be left as it is.
        tokenizer: its tokenizer.
        forget: the forget examples.
        alternates: other answers to each forget prompt, where the user gave them.
        max_length: longest sequence in tokens.
        training: options of the run's own training, for a stage that trains too.
        batch_size: sequences at a time.
        seed: of whatever is drawn.
        output_dir: of the run, where what is made is kept for a person to read; None where nothing is saved.
        progress: progress bars on stderr.
        train: trains another model, for a method that needs one first: a method's name, and `model`, `tokenizer`,
            `retain`, `progress` and options as `unlearning.train` takes them; returns the trained model.
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
class Prepared:
    """What the method trains on in place of what the user gave; None leaves it as it is.

    Attributes:
        alternates: other answers to each forget prompt.
        forget: the tokenised forget set.
        notes: what to say of it: by name, numbers or texts; stored with the run.
    """

    alternates: Sequence[Sequence[str]] | None = None
    forget: Sequence[Span] | None = None
    notes: dict[str, Any] | None = None


Prepare = Callable[[Start, Any], Prepared]
"""Start and the method's options to what the method trains on."""

Finish = Callable[[PreTrainedModel, PreTrainedModel, Any], None]
"""The trained model, the start model and the method's options: changes the trained model's weights in place."""
