"""`transformers.TrainingArguments` from the options of a run, and optimizers of other packages."""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from unlearning.checkpoints.quantized_base import n_bytes, n_parameters
from unlearning.common.errors import InputError
from unlearning.options import TrainOptions
from unlearning.training.bfloat16_optimizer import Bfloat16Optimizer


def resolve_device(name: str) -> torch.device:
    """Choose the device to train on.

    Args:
        name: "cpu", "cuda", or "auto" for CUDA if the machine has it.

    Returns:
        The device.

    Raises:
        InputError: The name is "cuda" and the machine has no CUDA device.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("`device` must be cpu or auto on a machine without a CUDA device, got cuda. Use cpu.")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


OPTIMIZERS = {
    "adamw_8bit": ("adamw_bnb_8bit", "AdamW8bit"),
    "paged_adamw": ("paged_adamw_32bit", "PagedAdamW"),
    "paged_adamw_8bit": ("paged_adamw_8bit", "PagedAdamW8bit"),
}
"""Names that transformers and bitsandbytes give to optimizers of bitsandbytes."""


def check_optimizer(name: str, device: torch.device) -> None:
    """Check that an optimizer of bitsandbytes runs.

    Args:
        name: The option `optimizer`.
        device: Device to train on.

    Raises:
        InputError: bitsandbytes is not installed, or the optimizer is paged and the device is no CUDA device.
    """
    if name in OPTIMIZERS and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"`optimizer` {name} needs bitsandbytes. Run: pip install bitsandbytes")
    if name.startswith("paged") and device.type != "cuda":
        raise InputError(
            f"`optimizer` {name} needs a CUDA device, whose moments it moves to the CPU's memory where they do not "
            f"fit. Set {name.removeprefix('paged_')}."
        )


def check_launch(method: str, *, combines_gradients: bool) -> None:
    """Check that the launcher's engine supports the training step.

    Args:
        method: Name of the method.
        combines_gradients: The method needs the gradients of its two losses separately, parameter by parameter.

    Raises:
        InputError: The engine is DeepSpeed, which makes its optimizer step inside `backward`; or it is FSDP 1, which
            flattens parameters, and the method combines gradients.
    """
    launch = "accelerate launch --use_fsdp --fsdp_version 2 -m unlearning train ..."
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(
            "DeepSpeed is not supported: it makes its optimizer step inside one backward pass, and an unlearning step "
            f"has one for each of two losses. Launch with FSDP instead: {launch}"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if combines_gradients and sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            f"FSDP 1 is not supported by {method}, which combines gradients parameter by parameter, because FSDP 1 "
            f"flattens the parameters. Use version 2: {launch}"
        )


def step_batch_size(options: TrainOptions, n_processes: int) -> int:
    """Return the number of examples that one optimizer step reads, over all processes."""
    assert options.gradient_accumulation_steps is not None
    return options.batch_size * options.gradient_accumulation_steps * n_processes


def planned_steps(options: TrainOptions, n_examples: int, n_processes: int) -> int:
    """Return the number of optimizer steps of a run of `n_examples` an epoch, if nothing stops it."""
    assert options.epochs is not None
    return options.max_steps or options.epochs * math.ceil(n_examples / step_batch_size(options, n_processes))


def training_arguments(
    options: TrainOptions, *, n_steps: int, device: torch.device, output_dir: str, hidden_losses: bool
) -> TrainingArguments:
    """Return the parent trainer's arguments.

    Args:
        options: The trainer's options, with those of the recipe.
        n_steps: Optimizer steps of the run.
        device: Device to train on.
        output_dir: Directory of the checkpoints.
        hidden_losses: A loss reads a block's output, so that the parameters above that block get no gradient.

    Returns:
        Arguments of `transformers.Trainer`.

    Raises:
        InputError: The device does not support the precision.
    """
    if options.precision == "bfloat16" and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError(
            "`precision` bfloat16 is not supported under FSDP, whose checkpoints hold no state of float32 steps. Set "
            "bf16_mixed."
        )
    if options.base_bits and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise InputError("`base_bits` is not supported under FSDP, which shards weights without their scales. Use DDP.")
    if options.precision == "fp16_mixed" and device.type == "cpu":
        raise InputError("`precision` must be float32, bf16_mixed or bfloat16 on a CPU, got fp16_mixed")
    assert options.learning_rate is not None and options.epochs is not None and options.lr_schedule is not None
    schedule = "constant_with_warmup" if options.lr_schedule == "constant" else options.lr_schedule
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    args = TrainingArguments(
        output_dir=output_dir,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=1,  # one call of the step reads the whole step batch
        lr_scheduler_type=schedule,
        warmup_steps=int(options.warmup_ratio * n_steps),  # rounded down, so that a single step is not all warm-up
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim=OPTIMIZERS[options.optimizer][0] if options.optimizer in OPTIMIZERS else "adamw_torch_fused",
        bf16=options.precision == "bf16_mixed",
        fp16=options.precision == "fp16_mixed",
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if distributed and device.type == "cpu" else None,
        ddp_find_unused_parameters=hidden_losses,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # One device per process: with several GPUs the parent would wrap the model in DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def optimizer_class(options: TrainOptions, *, bfloat16: bool = False) -> tuple[Any, dict[str, Any]] | None:
    """Return an optimizer that `transformers` does not provide.

    Args:
        options: The trainer's options.
        bfloat16: The weights that train are bfloat16; steps and moments are float32 (see
            `unlearning.training.bfloat16_optimizer`).

    Returns:
        The optimizer's class and its arguments; None if the parent makes the optimizer.

    Raises:
        InputError: The optimizer's package is not installed.
    """
    rates = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    inner: Any = torch.optim.AdamW
    if options.optimizer in OPTIMIZERS:
        import bitsandbytes.optim

        inner = getattr(bitsandbytes.optim, OPTIMIZERS[options.optimizer][1])
        # Settings of single parameters are kept by their numbers, and would be those of an earlier run's parameters.
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    if options.optimizer == "lion":
        try:
            from lion_pytorch import Lion
        except ImportError:
            raise InputError("`optimizer` lion needs lion-pytorch. Run: pip install lion-pytorch") from None
        inner = Lion
    if bfloat16:
        return Bfloat16Optimizer, {**rates, "inner": inner, "update": options.bfloat16_update, "seed": options.seed}
    return (inner, rates) if options.optimizer == "lion" else None


def state_line(model: PreTrainedModel, options: TrainOptions) -> str:
    """Say how much memory weights, gradients and moments take; activations and a kept reference model come on top.

    Args:
        model: The model, with the parameters that train chosen.
        options: The trainer's options.

    Returns:
        One line.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    n_trained = sum(parameter.numel() for parameter in trained)
    n_all, weights = n_parameters(model), n_bytes(model)
    size = sum(parameter.nbytes for parameter in trained) // n_trained
    narrow = any(parameter.dtype == torch.bfloat16 for parameter in trained)
    wide = set() if narrow else {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    moments = sum(_moments(parameter, options.optimizer, wide=parameter in wide) for parameter in trained) / n_trained
    master = 4 if narrow and options.bfloat16_update == "master" else 0
    gradients = 4 if narrow else size  # of bfloat16 weights they are summed in float32
    parts = {"weights": size, "float32 weights": master, "gradients": gradients, "moments": moments}
    words = " + ".join(f"{size:.3g} {name}" for name, size in parts.items() if size)
    total = weights + n_trained * (master + gradients + moments)
    frozen = ""
    if n_all > n_trained:
        frozen = f", {(weights - n_trained * size) / (n_all - n_trained):.3g} bytes per parameter"
    return (
        f"state: {words} = {sum(parts.values()):.3g} bytes per trained parameter ({n_trained / 1e6:.3g} of "
        f"{n_all / 1e6:.3g} million); {total / 1e9:.3g} GB with what is frozen{frozen}"
    )


def _moments(parameter: torch.Tensor, optimizer: str, *, wide: bool) -> int:
    """Return the bytes of a parameter's moments.

    Of 8-bit optimizers bitsandbytes keeps the moments of small tensors in float32, and transformers those of embeddings
    too (`wide`) where it makes the optimizer.
    """
    n = parameter.numel()
    if optimizer.endswith("8bit") and n >= 4096 and not wide:
        return 2 * (n + 4 * math.ceil(n / 256))  # one byte each, and a scale for every 256
    return (4 if optimizer == "lion" else 8) * n


def tensorboard_callback(directory: Path) -> TrainerCallback:
    """Make a callback that writes every line of the history for `tensorboard --logdir`.

    Args:
        directory: Directory of the event files.

    Returns:
        The callback.

    Raises:
        InputError: The package tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("`tensorboard` needs the package of that name. Run: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(directory)))
