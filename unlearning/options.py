"""Typed options: declared as fields of a dataclass, printed with type, default and source, checked in one place.

`train(..., name=value)` and `unlearn train --set name=value` take the same options and values.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unlearning.common.errors import InputError, check_at_least, nearest
from unlearning.data.chat import DEFAULT_CHAT_DATE

T = TypeVar("T")

Named = Literal["file", "data", "model", "directory", "benchmark", "control"]
"""What an option may name: a file, a source of `read_training_data`, a model, the directory of named data sets, a
benchmark's data, or a control (a model or the directory of its evaluation)."""

LearningRateSchedule = Literal["linear", "cosine", "constant"]

MAX_WHOLE = 10**9
"""Largest whole number that an option takes unless it says otherwise."""

MAX_NUMBER = 1e30
"""Largest other number; products of larger ones overflow float32, in which models are trained."""


@dataclass(frozen=True)
class Condition:
    """What must hold so that an option has an effect.

    Attributes:
        text: The condition as a user reads it after "unless".
        holds: Return whether a dataclass of options meets it.
    """

    text: str
    holds: Callable[[Any], bool]


FORGETS = Condition("gamma is above 0", lambda options: options.gamma > 0)
"""The forget loss has a weight."""

KEEPS = Condition("alpha is above 0", lambda options: options.alpha > 0)
"""The retain loss has a weight."""


def option(
    default: Any,
    help: str,
    *,
    source: str = "",
    names: Named | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    read_if: Condition | None = None,
    required: bool = False,
) -> Any:
    """Declare a field of an options dataclass.

    Args:
        default: Value if the user gives none.
        help: What the user sets, in one line, for `unlearn methods`.
        source: Paper or code that the default comes from.
        names: What the value names, if that lies outside the run: the run's record then holds a hash of its content,
            since the same name may stand for other content later.
        minimum: Smallest value that is allowed.
        maximum: Largest value that is allowed; None for `MAX_WHOLE` or `MAX_NUMBER`.
        above: Value that the option must exceed.
        below: Value that the option must stay below.
        read_if: Condition under which the option has an effect; None for any. An option that is set and has none is
            refused.
        required: The user must set the option; its default is None.

    Returns:
        The dataclass field.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    metadata = {"help": help, "source": source, "names": names, "read_if": read_if, "required": required, **bounds}
    return dataclasses.field(default=default, metadata=metadata)


_ADAPTER = Condition("lora_rank is above 0", lambda options: options.lora_rank > 0)
_BENCHMARK = Condition("benchmark is set", lambda options: options.benchmark is not None)


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training loop, the same for every method.

    What is None here and is a part of a recipe comes from the method's recipe. Other defaults: open-unlearning's TOFU
    configuration.
    """

    learning_rate: float | None = option(
        None, "peak learning rate (none: the recipe's, by the number of parameters)", above=0
    )
    epochs: int | None = option(
        None,
        "passes over the forget set, finetune: over the retain set (none: the recipe's); not read if max_steps is set",
        minimum=1,
    )
    max_steps: int | None = option(None, "optimizer steps (none: as many as epochs needs)", minimum=1)
    batch_size: int = option(4, "forget examples per micro-batch and process, and as many retain examples", minimum=1)
    gradient_accumulation_steps: int | None = option(
        None, "micro-batches per optimizer step (none: the recipe's, by the number of examples)", minimum=1
    )
    tune: bool = option(
        False, "search the learning rate first, from the given or the recipe's, on a sample of the data"
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion"] = option(
        "adamw",
        "optimizer; 8-bit and paged ones need bitsandbytes, paged ones a CUDA device, lion needs lion-pytorch",
        source="open-unlearning",
    )
    lr_schedule: LearningRateSchedule | None = option(
        None, "learning rate after the warm-up (none: the recipe's, linear for nearly all)", source="open-unlearning"
    )
    warmup_ratio: float = option(
        0.1, "warm-up as a fraction of all steps; 0.1 is 1 epoch of 10", source="open-unlearning", minimum=0, below=1
    )
    weight_decay: float = option(0.01, "weight decay of the optimizer", source="open-unlearning", minimum=0)
    max_grad_norm: float = option(
        1.0, "norm to which gradients are clipped (0: no clipping)", source="open-unlearning", minimum=0
    )
    precision: Literal["float32", "bf16_mixed", "fp16_mixed", "bfloat16"] = option(
        "float32",
        "float32 weights, float32 weights with mixed precision, or bfloat16 weights (the frozen base of an adapter)",
    )
    bfloat16_update: Literal["stochastic", "master"] = option(
        "stochastic",
        "how bfloat16 weights take a float32 step: rounded up or down at random, or from float32 weights beside them",
        read_if=Condition(
            "precision=bfloat16 and no adapter trains",
            lambda options: options.precision == "bfloat16" and not options.lora_rank,
        ),
    )
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "data type of the saved weights (none: that of the checkpoint before training; of an adapter, float32)"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, which saves memory")
    train_parameters: str | None = option(
        None, "regular expression of the parameters to train (none: the method's default)"
    )
    lora_rank: int = option(
        0, "rank of a LoRA adapter to train instead of the weights (0: no adapter)", minimum=0, maximum=16_384
    )
    lora_alpha: int = option(
        16, "alpha of the adapter, whose scale is alpha / rank", source="UNDIAL 2402.10052", minimum=1, read_if=_ADAPTER
    )
    lora_dropout: float = option(
        0.0, "probability of dropping an input of the adapter", minimum=0, below=1, read_if=_ADAPTER
    )
    lora_targets: str | None = option(
        None, "regular expression of the modules to adapt (none: every linear layer)", read_if=_ADAPTER
    )
    base_bits: Literal[4, 8] | None = option(
        None, "bits of a weight of the adapter's frozen base (none: those of precision)", read_if=_ADAPTER
    )
    seed: int = option(
        0, "random seed (order of the examples, random draws)", source="open-unlearning", minimum=0, below=2**32
    )
    max_length: int | None = option(
        None, "maximum length of an example in tokens (none: the model's context)", minimum=2
    )
    too_long: Literal["refuse", "cut", "skip"] = option(
        "refuse", "treatment of a question and answer longer than max_length; cut drops the answer's end"
    )
    template: str | None = option(
        None, r"prompt around a question (none: the data set's own, else 'Question: {question}\nAnswer:')"
    )
    chat: bool = option(False, "wrap prompts in the tokenizer's chat template instead of template")
    chat_date: str = option(DEFAULT_CHAT_DATE, "date that the chat template writes as today's")
    pack: int | None = option(
        None,
        "cut documents after the sentence that makes a piece longer than this many characters (none: no cut)",
        source="ConceptVectors: 400",
        minimum=1,
    )
    data_dir: str | None = option(
        None,
        "directory of named data sets such as tofu:forget05 (none: $DISSECT_DATA, else the hub)",
        names="directory",
    )
    append_eos: bool = option(True, "end every answer with the end-of-sequence token")
    reference_budget: float = option(
        4.0,
        "GB on disk for the reference model's logits or hidden states; if they need more, the model stays loaded",
        minimum=0,
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device; auto takes a GPU if there is one")
    logging_steps: int = option(10, "optimizer steps between two lines of the history", minimum=1)
    tensorboard: bool = option(False, "also write the history to DIR/logs; needs tensorboard")
    save_every: int | None = option(None, "optimizer steps between two checkpoints (none: no checkpoints)", minimum=1)
    keep_checkpoints: int = option(
        2,
        "newest checkpoints to keep, also when the run is finished (0: one until then, none after)",
        minimum=0,
        read_if=Condition("save_every is set", lambda options: options.save_every is not None),
    )
    eval_every: int | None = option(
        None,
        "optimizer steps between two evaluations (none: only before and after, or 10 if a metric is named)",
        minimum=1,
    )
    eval_examples: int = option(
        64, "maximum number of forget and of retain examples to evaluate on in training, evenly spaced", minimum=1
    )
    benchmark: str | None = option(
        None,
        "benchmark of `unlearn eval` to run at every evaluation, such as tofu:forget05 (none: no benchmark)",
        names="benchmark",
    )
    benchmark_control: str | None = option(
        None,
        "control that the benchmark compares with: a model, or the directory of its evaluation",
        names="control",
        read_if=_BENCHMARK,
    )
    benchmark_rows: int = option(
        40, "rows of each of the benchmark's sets, evenly spaced", minimum=1, read_if=_BENCHMARK
    )
    benchmark_generate: bool = option(
        False, "also compute the benchmark's metrics that need generated answers", read_if=_BENCHMARK
    )
    keep_best: str | None = option(
        None, "metric, such as gap_rouge, at whose best step the weights are saved (none: the last step)"
    )
    stop_when: str | None = option(
        None, "condition under which training stops, such as forget_rouge<0.2 (none: no early stop)"
    )
    target_forget: float | None = option(
        None, "forget_probability at which training stops (none: no early stop)", above=0, below=1
    )
    target_retain: float = option(
        0.9,
        "with target_forget, also stop where less than this fraction of retain_probability is left",
        above=0,
        below=1,
        read_if=Condition("target_forget is set", lambda options: options.target_forget is not None),
    )
    collapse_below: float = option(
        0.1, "warn if retain_probability falls below this fraction of its initial value", minimum=0, below=1
    )


_RENAMED = {"benchmark_retain": "benchmark_control"}
"""Old names of options, which work in this version only, with the present ones."""


def with_present_names(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with old names replaced by the present ones."""
    return {_RENAMED.get(name, name): value for name, value in options.items()}


def resolve_options(method: str, method_options: type[T], given: dict[str, Any]) -> tuple[T, TrainOptions]:
    """Split flat options into the method's and the trainer's, and check every value.

    Args:
        method: Name of the method, for messages.
        method_options: Dataclass of the method's options.
        given: Values by name; a text is parsed by its option's type, such as `--set name=value` gives it.

    Returns:
        The method's options and the trainer's.

    Raises:
        InputError: A name is unknown (the message proposes the nearest known one), an option is missing, or a value has
            the wrong type, is out of range, or has no effect besides the other values.
    """
    given = with_present_names(given)
    own = {field.name for field in dataclasses.fields(method_options)}  # type: ignore[arg-type]
    shared = {field.name for field in dataclasses.fields(TrainOptions)}
    for name in given:
        if name not in own | shared:
            hint = nearest(name, sorted(own | shared)) or ";"
            raise InputError(f"{method} has no option {name!r}{hint} `unlearn methods` lists them")
    built = (
        _build(method_options, {name: value for name, value in given.items() if name in own}),
        _build(TrainOptions, {name: value for name, value in given.items() if name in shared}),
    )
    for options in built:
        refuse_idle(options, given)
    for field in dataclasses.fields(method_options):  # type: ignore[arg-type]
        if field.metadata["required"] and getattr(built[0], field.name) is None:
            raise InputError(f"{method} needs `{field.name}`, {field.metadata['help']}. Set it.")
    return built


def refuse_idle(options: Any, given: Iterable[str]) -> None:
    """Check that every option that was set has an effect.

    Args:
        options: A dataclass of options.
        given: Names of the options that the user set. One that has its default value is no wish, and passes.

    Raises:
        InputError: An option has no effect besides the others.
    """
    named = set(given)
    for field in dataclasses.fields(options):
        condition = field.metadata["read_if"]
        value = getattr(options, field.name)
        if field.name in named and value != field.default and condition is not None and not condition.holds(options):
            raise InputError(f"`{field.name}` has no effect unless {condition.text}, got {shown(value)}. Remove it.")


def shown(value: Any) -> str:
    """Return an option's value as a user types it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return value.replace("\n", "\\n") if isinstance(value, str) else f"{value:g}"


def describe_type(hint: Any) -> str:
    """Return an option's type as a user reads it."""
    if get_origin(hint) is Literal:
        return ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) in _UNIONS:
        return " or ".join("none" if part is type(None) else describe_type(part) for part in get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


_UNIONS = (types.UnionType, Union)
"""Origins of the types of options that may be none; Python gives a `Literal` the second."""


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
    """Return the value in the option's type, or raise InputError."""
    # Python writes no whole number of thousands of digits.
    given = "thousands of digits" if isinstance(value, int) and value.bit_length() > 10_000 else repr(value)
    refused = InputError(f"`{name}` must be {describe_type(hint)}, got {given}")
    if get_origin(hint) in _UNIONS:
        if value is None or value == "none":
            return None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        chosen = [choice for choice in get_args(hint) if value in (choice, str(choice))]
        if not chosen:
            raise refused
        return chosen[0]
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
    except (ValueError, OverflowError):
        raise refused from None
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise refused
    return int(number) if hint is int else number


def _check_range(name: str, value: Any, metadata: Any) -> None:
    if value is None:
        return
    minimum, maximum, above, below = (metadata.get(bound) for bound in ("minimum", "maximum", "above", "below"))
    if minimum is not None:
        check_at_least(name, value, minimum)
    if above is not None and value <= above:
        raise InputError(f"`{name}` must be above {above}, got {value}")
    if below is not None and value >= below:
        raise InputError(f"`{name}` must be below {below}, got {value}")
    if below is None and isinstance(value, int | float):
        most = maximum if maximum is not None else MAX_WHOLE if isinstance(value, int) else MAX_NUMBER
        check_at_least(name, value, -most)
        if value > most:
            raise InputError(f"`{name}` must be at most {most}, got {value}")
