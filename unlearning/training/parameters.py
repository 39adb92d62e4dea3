"""The parameters that train: all, those of a regular expression, those that the method names, or an adapter."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearning.common.errors import InputError
from unlearning.common.patterns import searcher
from unlearning.methods.method import AnyMethod
from unlearning.options import TrainOptions


def choose_parameters(
    model: PreTrainedModel, method: AnyMethod, method_options: Any, options: TrainOptions, *, base: str
) -> None:
    """Choose the parameters that train and freeze the others, so that neither weight decay nor clipping sees them.

    Args:
        model: The model to train.
        method: The unlearning method.
        method_options: The method's options.
        options: The trainer's options.
        base: Name of the model, which a saved adapter records as its base.

    Raises:
        InputError: Two options contradict each other, or an expression matches no parameter.
    """
    chosen = method.trains(model, method_options) if method.trains is not None else None
    if options.lora_rank:
        if options.train_parameters is not None:
            raise InputError("`lora_rank` and `train_parameters` exclude each other. Set only one of them.")
        if method.finish is not None:
            raise InputError(
                f"`lora_rank` is not supported by {method.name}, which edits the full weights after training. "
                "Remove `lora_rank`."
            )
        from unlearning.checkpoints.lora import ALL_LINEAR, add_adapter

        add_adapter(
            model,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            dropout=options.lora_dropout,
            targets=options.lora_targets or (ALL_LINEAR if chosen is None else _linear_maps(model, chosen, method)),
            seed=options.seed,
            base=base,
        )
        for parameter in model.parameters():
            if parameter.requires_grad:  # small, and what trains: float32 on a base of any dtype
                parameter.data = parameter.data.float()
    else:
        _freeze_others(model, options.train_parameters or chosen)


def _matcher(chosen: str | frozenset[str] | None) -> Callable[[str], bool]:
    """Return a function that says whether a parameter is chosen: by an expression, by its name, or in any case."""
    return chosen.__contains__ if isinstance(chosen, frozenset) else searcher("train_parameters", chosen or "")


def _linear_maps(model: PreTrainedModel, chosen: str | frozenset[str], method: AnyMethod) -> list[str]:
    """Return the names of the linear maps whose weights a method trains."""
    matches = _matcher(chosen)
    maps = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and matches(f"{name}.weight")
    ]
    if not maps:
        raise InputError(
            f"`lora_rank` adapts linear maps, and {method.name} trains none of this model. Set `lora_targets`, or "
            "remove `lora_rank`."
        )
    return maps


def _freeze_others(model: PreTrainedModel, chosen: str | frozenset[str] | None) -> None:
    matches = _matcher(chosen)
    names = [name for name, _ in model.named_parameters()]
    if not any(matches(name) for name in names):
        raise InputError(
            f"`train_parameters` must match at least one of the {len(names)} parameters (such as {names[-1]}), got "
            f"{chosen!r}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(matches(name))
