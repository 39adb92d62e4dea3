"""Our options in `transformers.TrainingArguments`, and the optimizers that other packages bring."""

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from unlearning.common.errors import InputError
from unlearning.options import TrainOptions


def resolve_device(name: str) -> torch.device:
    """The device of an option `auto`, `cpu` or `cuda`.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("device=cuda: this machine has no CUDA device; use device=cpu")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def check_launch(method: str, *, combines_gradients: bool) -> None:
    """Refuse what the launcher asks for and the step cannot do.

    Args:
        method: its name.
        combines_gradients: whether it needs the two losses' gradients apart, parameter by parameter.

    Raises:
        InputError: DeepSpeed, whose engine steps inside of `backward`; for such a method the first FSDP, which hides
            parameters in flat ones.
    """
    launch = "accelerate launch --use_fsdp --fsdp_version 2 -m unlearning train ..."
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise InputError(
            "DeepSpeed steps inside its own backward pass, and a step here has one for each of two losses (BLUR "
            f"combines their gradients); launch with FSDP instead: {launch}"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if combines_gradients and sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(f"{method} combines gradients parameter by parameter, which FSDP 1 flattens; use {launch}")


def training_arguments(
    options: TrainOptions, *, n_windows: int, device: torch.device, output_dir: str, hidden_losses: bool
) -> TrainingArguments:
    """The parent trainer's arguments.

    Args:
        options: ours.
        n_windows: optimizer steps an epoch.
        device: where to train.
        output_dir: gets the checkpoints.
        hidden_losses: whether a loss reads a block's output, so that parameters above it have no gradient.

    Raises:
        InputError: a precision that the device does not have.
    """
    if options.precision == "fp16_mixed" and device.type == "cpu":
        raise InputError("precision=fp16_mixed needs a GPU; use bf16_mixed or float32 on a CPU")
    steps = options.max_steps or options.epochs * n_windows
    schedule = "constant_with_warmup" if options.lr_schedule == "constant" else options.lr_schedule
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    args = TrainingArguments(
        output_dir=output_dir,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=1,  # a step has its whole window
        lr_scheduler_type=schedule,
        warmup_steps=int(options.warmup_ratio * steps),  # down, so that a single step is not all warm-up
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_bnb_8bit" if options.optimizer == "adamw_8bit" else "adamw_torch_fused",
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
    # One device a process: on a machine with several GPUs the parent would wrap the model in DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def n_windows(n_examples: int, window: int) -> int:
    """Optimizer steps an epoch."""
    return math.ceil(n_examples / window)


def optimizer_class(options: TrainOptions) -> tuple[Any, dict[str, Any]] | None:
    """An optimizer that the parent does not bring, with its arguments; None for the others.

    Raises:
        InputError: its package is not installed, or does not run here.
    """
    if options.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("optimizer=adamw_8bit needs bitsandbytes: pip install bitsandbytes")
    if options.optimizer != "lion":
        return None
    try:
        from lion_pytorch import Lion
    except ImportError:
        raise InputError("optimizer=lion needs lion-pytorch: pip install lion-pytorch") from None
    return Lion, {"lr": options.learning_rate, "weight_decay": options.weight_decay}


def tensorboard_callback(directory: Path) -> TrainerCallback:
    """Writes every line of the history to `directory`, for `tensorboard --logdir`.

    Raises:
        InputError: tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard=true needs tensorboard: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(directory)))
