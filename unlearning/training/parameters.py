"""Which parameters train: all, those of a regular expression, those that the method names, or an adapter's."""

import re
from typing import Any

from transformers import PreTrainedModel

from unlearning.common.errors import InputError
from unlearning.methods.method import AnyMethod
from unlearning.options import TrainOptions


def choose_parameters(
    model: PreTrainedModel, method: AnyMethod, method_options: Any, options: TrainOptions, *, base: str
) -> int:
    """Freeze the others, so that neither the optimizer's decay nor the clipping sees them; how many numbers train.

    Args:
        model: to train.
        method: by which.
        method_options: its own.
        options: the trainer's.
        base: name of the start model, which a saved adapter gives.

    Raises:
        InputError: two choices contradict, or an expression matches nothing.
    """
    if options.lora_rank:
        if options.train_parameters is not None:
            raise InputError("lora_rank trains an adapter and train_parameters weights; set one of the two")
        if method.finish is not None:
            raise InputError(f"{method.name} makes whole weights of those that it trained; leave lora_rank out")
        if method.trains is not None and method.trains(model, method_options) is not None:
            raise InputError(f"{method.name} trains weights that it names itself; leave lora_rank out")
        if method.finish is not None:
            raise InputError(f"{method.name} does arithmetic on whole weights; leave lora_rank out")
        from unlearning.checkpoints.lora import ALL_LINEAR, add_adapter

        add_adapter(
            model,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            targets=options.lora_targets or ALL_LINEAR,
            seed=options.seed,
            base=base,
        )
    else:
        pattern = options.train_parameters
        if pattern is None and method.trains is not None:
            pattern = method.trains(model, method_options)
        _freeze_others(model, pattern)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _freeze_others(model: PreTrainedModel, pattern: str | None) -> None:
    try:
        matches = re.compile(pattern or "").search
    except re.error as error:
        raise InputError(f"train_parameters={pattern!r}: not a regular expression: {error}") from None
    names = [name for name, _ in model.named_parameters()]
    if not any(matches(name) for name in names):
        raise InputError(f"train_parameters={pattern!r} matches none of the {len(names)} parameters, as {names[-1]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(matches(name)))
