"""A resolved request to train, and the model that it trains."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.methods.method import AnyMethod, Needs
from unlearning.options import TrainOptions
from unlearning.training.evaluation_callback import Rule, Target


@dataclass(frozen=True)
class Job:
    """A resolved request to train.

    Attributes:
        method: The unlearning method.
        method_options: The method's options.
        options: The trainer's options.
        needs: Inputs that the method reads under these options.
        rule: Rule that stops the training (option `stop_when`); None for no rule.
        target: Aim at which training stops (option `target_forget`); None for none.
        device: Device to train on.
        output_dir: Output directory; None to save nothing.
        progress: Show progress bars on stderr.
        train: Train another model (see `PreparationInputs.train`).
    """

    method: AnyMethod
    method_options: Any
    options: TrainOptions
    needs: Needs
    rule: Rule | None
    target: Target | None
    device: torch.device
    output_dir: Path | None
    progress: bool
    train: Callable[..., PreTrainedModel]

    @property
    def keeps_files(self) -> bool:
        """True if the run writes into its directory before its end: checkpoints, logs, or prepared data."""
        options = self.options
        wanted = options.save_every or options.keep_best or options.tensorboard or options.tune or self.method.prepare
        return self.output_dir is not None and bool(wanted)


@dataclass(frozen=True)
class LoadedModel:
    """The model to train. Before the first step it is the reference model.

    Attributes:
        model: The model, in float32.
        name: Directory, hub id or built-in name.
        sha256: Content hash of its weights before training.
        tokenizer: Its tokenizer.
        tokenizer_files: Directory that the tokenizer was read from; None for one that was given in memory.
        stored: Data type of its weights before they were loaded, a name in `unlearning.checkpoints.storage.DTYPES`.
    """

    model: PreTrainedModel
    name: str
    sha256: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_files: Path | None = None
    stored: str = "float32"

    def saved_dtype(self, options: TrainOptions) -> str:
        """Return the data type in which the trained model is saved; an adapter is small, and loses nothing."""
        return options.save_dtype or ("float32" if options.lora_rank else self.stored)
