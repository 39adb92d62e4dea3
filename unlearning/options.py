"""Flat, typed options: declared as dataclass fields, checked once, printed resolved, unknown names refused."""

import dataclasses
import math
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from unlearning.common.errors import InputError, nearest
from unlearning.data.chat import DEFAULT_CHAT_DATE

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    source: str = "",
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that carries what `unlearn methods` prints and what makes a value refusable.

    Args:
        default: the value where the user gives none.
        help: one line.
        source: where the default comes from.
        minimum: smallest value allowed.
        above, below: bounds that the value must stay between.
    """
    metadata = {"help": help, "source": source, "minimum": minimum, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainOptions:
    """Options of the trainer, the same for every method. Defaults: open-unlearning's TOFU recipe."""

    learning_rate: float = option(1e-5, "peak learning rate", source="open-unlearning", above=0)
    epochs: int = option(
        10, "passes over the forget set (finetune: the retain set)", source="open-unlearning", minimum=1
    )
    max_steps: int | None = option(None, "optimizer steps, instead of epochs", minimum=1)
    batch_size: int = option(4, "forget examples a micro-batch and process, and as many retain examples", minimum=1)
    gradient_accumulation_steps: int = option(8, "micro-batches an optimizer step", source="open-unlearning", minimum=1)
    optimizer: Literal["adamw", "adamw_8bit", "lion"] = option(
        "adamw", "adamw_8bit needs bitsandbytes, lion needs lion-pytorch", source="open-unlearning"
    )
    lr_schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "after the warm-up", source="open-unlearning"
    )
    warmup_ratio: float = option(
        0.1, "share of the steps that warm up: 1 epoch of 10", source="open-unlearning", minimum=0, below=1
    )
    weight_decay: float = option(0.01, "of the optimizer", source="open-unlearning", minimum=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to it (0: never)", source="open-unlearning", minimum=0)
    precision: Literal["float32", "bf16_mixed", "fp16_mixed", "bfloat16"] = option(
        "float32", "float32 weights, mixed precision over them, or bfloat16 weights"
    )
    gradient_checkpointing: bool = option(False, "activations are computed again in the backward pass")
    train_parameters: str | None = option(None, "regular expression of the parameters that train (none: as the method)")
    lora_rank: int = option(0, "rank of a LoRA adapter that trains in place of the weights (0: none)", minimum=0)
    lora_alpha: int = option(16, "scale of the adapter times its rank", source="UNDIAL 2402.10052", minimum=1)
    lora_dropout: float = option(0.0, "of the adapter", minimum=0, below=1)
    lora_targets: str | None = option(None, "regular expression of the adapted modules (none: every linear one)")
    seed: int = option(
        0, "of the orders of the examples and of what is drawn", source="open-unlearning", minimum=0, below=2**32
    )
    max_length: int | None = option(None, "longest example in tokens (none: the model's context)", minimum=2)
    too_long: Literal["refuse", "cut", "skip"] = option("refuse", "questions and answers longer than max_length")
    template: str | None = option(None, r"wraps the questions (none: 'Question: {question}\nAnswer:', MUSE its own)")
    chat: bool = option(False, "wrap prompts in the tokenizer's chat template instead")
    chat_date: str = option(DEFAULT_CHAT_DATE, "what a chat template takes for today")
    pack: int | None = option(
        None, "cut documents into paragraphs longer than so many characters", source="ConceptVectors: 400", minimum=1
    )
    data_dir: str | None = option(None, "where named data sets (tofu:forget05) are (none: $DISSECT_DATA, the hub)")
    append_eos: bool = option(True, "end every answer with the end-of-sequence token")
    reference_budget: float = option(
        4.0, "GB on disk for the start model's logits or hidden states; above it the model is kept", minimum=0
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one")
    logging_steps: int = option(10, "optimizer steps between two lines of the history", minimum=1)
    tensorboard: bool = option(False, "write the history to DIR/logs too, where tensorboard is installed")
    save_every: int | None = option(None, "optimizer steps between two checkpoints, to resume from", minimum=1)
    keep_checkpoints: int = option(2, "newest checkpoints that are kept", minimum=1)
    eval_every: int | None = option(None, "optimizer steps between two evaluations (none: 10 in the run)", minimum=1)
    eval_examples: int = option(64, "forget and retain examples of an evaluation during training", minimum=1)
    benchmark: str | None = option(None, "a benchmark of `unlearn eval` at every evaluation too, as tofu:forget05")
    benchmark_retain: str | None = option(
        None, "what it compares with: the retain model, or its evaluation's directory"
    )
    benchmark_rows: int = option(40, "rows of each of its sets, evenly spaced", minimum=1)
    benchmark_generate: bool = option(False, "measure what needs generated answers, too")
    keep_best: str | None = option(None, "save the weights of the step where this metric is best, as gap_rouge")
    stop_when: str | None = option(None, "stop where a metric passes a bound, as forget_rouge<0.2")
    collapse_below: float = option(
        0.1, "retain_probability under which a collapse is said, as a share of its first value", minimum=0, below=1
    )


def resolve_options(method: str, method_options: type[T], given: dict[str, Any]) -> tuple[T, TrainOptions]:
    """Split flat options into the method's and the trainer's, and check every value.

    Args:
        method: for the messages.
        method_options: the method's dataclass.
        given: by name; a text is parsed by its option's type, as `--set name=value` gives it.

    Raises:
        InputError: an unknown name (with the nearest known one), a value of the wrong type or out of range.
    """
    own = {field.name for field in dataclasses.fields(method_options)}  # type: ignore[arg-type]
    shared = {field.name for field in dataclasses.fields(TrainOptions)}
    for name in given:
        if name not in own | shared:
            hint = nearest(name, sorted(own | shared)) or ";"
            raise InputError(f"{method} has no option {name!r}{hint} `unlearn methods` lists them")
    return (
        _build(method_options, {name: value for name, value in given.items() if name in own}),
        _build(TrainOptions, {name: value for name, value in given.items() if name in shared}),
    )


def shown(value: Any) -> str:
    """An option's value as a user types it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return value.replace("\n", "\\n") if isinstance(value, str) else f"{value:g}"


def describe_type(hint: Any) -> str:
    """An option's type as a user reads it."""
    if get_origin(hint) is Literal:
        return ", ".join(str(choice) for choice in get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join("none" if part is type(None) else describe_type(part) for part in get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _build(cls: type[T], given: dict[str, Any]) -> T:
    hints = get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in given:
            continue
        value = _convert(field.name, given[field.name], hints[field.name])
        _check_range(field.name, value, field.metadata)
        values[field.name] = value
    return cls(**values)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """The value in the option's type, or InputError."""
    refused = InputError(f"{name}={value!r}: should be {describe_type(hint)}")
    if isinstance(hint, types.UnionType):
        if value is None or value == "none":
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise refused
        return value
    if hint is str:
        if not isinstance(value, str):
            raise refused
        return value
    if hint is bool:
        words = {"true": True, "false": False}
        converted = words.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(converted, bool):
            raise refused
        return converted
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise refused
    try:
        number = float(value)
    except ValueError:
        raise refused from None
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise refused
    return int(number) if hint is int else number


def _check_range(name: str, value: Any, metadata: Any) -> None:
    if value is None:
        return
    minimum, above, below = (metadata.get(bound) for bound in ("minimum", "above", "below"))
    if minimum is not None and value < minimum:
        raise InputError(f"{name}={value}: should be at least {minimum}")
    if above is not None and value <= above:
        raise InputError(f"{name}={value}: should be more than {above}")
    if below is not None and value >= below:
        raise InputError(f"{name}={value}: should be less than {below}")
