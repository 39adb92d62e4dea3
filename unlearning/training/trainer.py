"""`transformers.Trainer` with an unlearning method's step: one call is one whole optimizer step.

The parent's loop, schedules, logging, checkpoints and data-parallel wrappers are used as they are; what it would do
micro-batch by micro-batch is done here for a whole window, because the two losses are normalised by the window, and
because some methods combine the two gradients of the window.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from unlearning.checkpoints.load import without_bars
from unlearning.checkpoints.locate import is_adapter
from unlearning.checkpoints.lora import restore_adapter, save_adapter
from unlearning.common.errors import InputError
from unlearning.data.order import WindowPlan, WindowSampler
from unlearning.methods.method import AnyMethod, Batch, Window
from unlearning.objectives.bilevel import combine
from unlearning.objectives.combination import Bilevel
from unlearning.objectives.forward import unwrapped
from unlearning.objectives.gradients import GradientAccumulator, put, sum_over_ranks
from unlearning.training.arguments import n_windows
from unlearning.training.output_directory import WHOLE
from unlearning.training.training_set import TrainingSet


class Diverged(InputError):
    """A loss or a gradient is not finite."""


@dataclass(frozen=True)
class _Pass:
    """One of the two losses over one window: its micro-batches on this process, with their places in the data."""

    name: str
    weight: float
    loss: Any
    batches: Iterator[tuple[Batch, list[int]]]
    n_batches: int


class UnlearningTrainer(Trainer):
    """The parent's loop around a method's optimizer steps."""

    def __init__(
        self,
        *,
        method: AnyMethod,
        method_options: Any,
        model: PreTrainedModel,
        args: TrainingArguments,
        training_set: TrainingSet,
        batch_size: int,
        window: int,
        keep_checkpoints: int,
        callbacks: list[TrainerCallback],
        optimizer: tuple[Any, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=training_set,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer,
        )
        self.remove_callback(PrinterCallback)
        self.method = method
        self.method_options = method_options
        self.combination = method.combination(method_options)
        self.training_set = training_set
        self.batch_size = batch_size
        self.window = window
        self.keep_checkpoints = keep_checkpoints
        self.log_sums: dict[str, float] = {}
        self.steps_logged = 0
        self.trained_names: list[str] = []
        self._kept_accumulator: GradientAccumulator | None = None
        self._read: list[int] = []

    def get_train_dataloader(self) -> DataLoader[WindowPlan]:
        """One item a step: what to read, on this process."""
        # A plan takes the place of a list of indices, for which the types below have no name.
        sampler: Any = WindowSampler(
            self.training_set.main_lengths(),
            self.training_set.retain_lengths(),
            seed=self.args.seed,
            batch_size=self.batch_size,
            window=self.window,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        as_it_is: Any = _as_it_is
        loader: Any = DataLoader(self.training_set, batch_sampler=sampler, collate_fn=as_it_is)
        loader.set_epoch = sampler.set_epoch  # where the parent looks for it
        return loader

    def planned_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return n_windows(len(self.training_set), self.window) * int(self.args.num_train_epochs)

    def get_batch_samples(
        self,
        epoch_iterator: Iterator[Any],
        num_batches: int,
        device: torch.device,  # noqa: ARG002
    ) -> tuple[list[Any], None]:
        """The step's plan; the parent would count labels in it."""
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Any,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Float[Tensor, ""]:
        """All forward and backward passes of one optimizer step; leaves its gradient in `.grad`."""
        model.train()
        bilevel = self.combination if isinstance(self.combination, Bilevel) else None
        accumulator = self._accumulator(model) if bilevel else None
        passes = self._passes(model, inputs)
        pairs = self.training_set.pairs
        self._read = [pairs[item][0] for item in inputs.main] if pairs else inputs.main
        values: dict[str, float] = {}
        apart: list[list[Tensor]] = []
        for part in passes:
            # Gradients travel between processes once a step: with the last backward pass, or when combined.
            last = part.n_batches if part is passes[-1] and not bilevel else 0
            values[part.name] = self._backward(model, part, last, accumulator)
            if accumulator:
                apart.append(accumulator.take())
        logs = {f"{name}_loss": value for name, value in values.items()}
        if bilevel and accumulator:
            logs |= self._combine(bilevel, accumulator, *apart)
        logs |= self.combination.after_step(values.get("retain"))
        for name, logged in logs.items():
            self.log_sums[name] = self.log_sums.get(name, 0.0) + logged
        total = sum(part.weight * values[part.name] for part in passes)
        return torch.tensor(total, dtype=torch.float32, device=self.args.device)

    def _passes(self, model: torch.nn.Module, plan: WindowPlan) -> list["_Pass"]:
        """The losses that have a weight, forget first; one is through before the next, so one graph is in memory."""
        data, device = self.training_set, self.args.device
        window = data.window(plan)
        gamma, alpha = self.combination.weights()
        passes = []
        if self.method.forget_loss is not None and gamma:
            statistic = self._window_statistic(model, plan, window)
            batches = data.forget_batches(plan, window, device, statistic)
            passes.append(_Pass("forget", gamma, self.method.forget_loss, batches, len(plan.main_batches)))
        if self.method.retain_loss is not None and data.retain and alpha:
            n_batches = len(plan.retain_batches if data.pairs else plan.main_batches)
            batches = data.retain_batches(plan, window, device)
            passes.append(_Pass("retain", alpha, self.method.retain_loss, batches, n_batches))
        return passes

    def _backward(
        self, model: torch.nn.Module, part: "_Pass", travels: int, accumulator: GradientAccumulator | None
    ) -> float:
        """Forward and backward over all micro-batches, reducing gradients at number `travels`; the window's loss."""
        shares: list[tuple[Float[Tensor, ""], list[int]]] = []
        for batch, places in part.batches:  # not by `enumerate`, which would keep the batch
            with contextlib.nullcontext() if len(shares) + 1 == travels else self._not_reduced(model):
                value = part.loss(model, batch, self.method_options)
                del batch  # its constants, which may be as large as logits, go as the backward pass has used them
                if not value.requires_grad:
                    raise InputError(
                        f"the {part.name} loss of {self.method.name} depends on none of the parameters that train; "
                        "choose others (train_parameters)"
                    )
                # A batch without places is another process's, run only to keep step with it.
                shares.append((value.detach().double() * (1 if places else 0), places))
                # A data-parallel wrapper averages over processes what is a sum over them.
                weight = part.weight * self.args.world_size if places else 0.0
                self.accelerator.backward(weight * value)
            if accumulator:
                accumulator.add()
        return self._total(part.name, shares)

    def _window_statistic(self, model: torch.nn.Module, plan: WindowPlan, window: Window) -> float | None:
        if self.method.statistic is None:
            return None
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch, places in self.training_set.forget_batches(plan, window, self.args.device, None):
                total, count = self.method.statistic(model, batch, self.method_options)  # type: ignore[arg-type]
                if places:
                    sums += torch.tensor([total, count], dtype=torch.float64)
        total, count = self._summed(sums).tolist()
        return total / count if count else 0.0

    def _accumulator(self, model: torch.nn.Module) -> GradientAccumulator:
        """Of the parameters as the wrapper has them, which is known only once it is there."""
        if self._kept_accumulator is None:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # an evaluation leaves whole parameters in the place of the trained shards
            trained = [(n, p) for n, p in unwrapped(model).named_parameters() if p.requires_grad]
            self.trained_names = [name for name, _ in trained]
            self._kept_accumulator = GradientAccumulator([parameter for _, parameter in trained])
        return self._kept_accumulator

    def _combine(
        self, combination: Bilevel, accumulator: GradientAccumulator, forget: list[Tensor], retain: list[Tensor]
    ) -> dict[str, float]:
        """BLUR's direction in `.grad`, from the forget and the retain gradient of the whole window."""
        # Float16's loss scale and FSDP's factor are divided out: norms are logged, and the guard compares them.
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        # FSDP has averaged what the losses were multiplied for; without a wrapper's reduction they are a sum too many.
        factor = scale if self.is_fsdp_enabled else scale * self.args.world_size
        if factor != 1:
            for gradient in (*forget, *retain):
                gradient.mul_(1 / factor)
        sum_over_ranks([*forget, *retain])
        direction, report = combine(
            forget,
            retain,
            names=self.trained_names,
            gamma=combination.gamma,
            scope=combination.scope,
            clamp=combination.clamp,
        )
        if scale != 1:
            for gradient in direction:
                gradient.mul_(scale)
        put(accumulator.parameters, direction)
        return report.as_logs()

    def _total(self, name: str, shares: list[tuple[Float[Tensor, ""], list[int]]]) -> float:
        """The loss of the whole window, on all processes; refused on all of them where it is not finite."""
        total = float(self._summed(torch.stack([share for share, _ in shares]).sum().cpu().reshape(1))[0])
        if not math.isfinite(total):
            bad = [f"{name} examples {_listed(places)}" for share, places in shares if not math.isfinite(float(share))]
            where = bad[0] if bad else "a batch of another process"
            raise Diverged(f"the {name} loss of {self.method.name} is {total} at {self._step()}, in {where}")
        return total

    def _step(self) -> str:
        return f"step {self.state.global_step + 1} of {self.state.max_steps}"

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm before clipping, refused where it is not finite: the optimizer has not stepped yet."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # A float16 overflow is the loss scale's business, which skips the step.
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            data = "forget" if self.training_set.pairs else "retain"
            raise Diverged(
                f"the gradient of {self.method.name} has norm {float(norm)} at {self._step()}, over {data} examples "
                f"{_listed(self._read)}"
            )
        return norm

    def _summed(self, values: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return values
        return self.accelerator.reduce(values.to(self.args.device), reduction="sum").cpu()

    def _not_reduced(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        # FSDP would keep whole gradients where it does not reduce them.
        if self.args.world_size == 1 or self.accelerator.distributed_type == DistributedType.FSDP:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """Not counted: the parent's estimate wants a single `input_ids`."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last line logged, as means over them."""
        if "loss" in logs:
            n_steps = self.state.global_step - self.steps_logged
            logs |= {name: total / n_steps for name, total in self.log_sums.items()}
            self.log_sums = {}
            self.steps_logged = self.state.global_step
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights and configuration, or the adapter alone, from whatever wrapper holds them; collective under FSDP."""
        assert self.model is not None
        target = Path(output_dir or str(self.args.output_dir))
        with without_bars():
            if self.args.should_save and hasattr(self.model, "peft_config") and not self.is_fsdp_enabled:
                save_adapter(unwrapped(self.model), target)
            else:
                super().save_model(str(target), _internal_call)
        (target / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with without_bars():
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            state = {
                "combination": self.combination.state(),
                "log_sums": self.log_sums,
                "steps_logged": self.steps_logged,
                "loss_sum": float(self._tr_loss),
                "globalstep_last_logged": self._globalstep_last_logged,
            }
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            partial = folder / f".{WHOLE}.partial"
            partial.write_text(json.dumps(state), encoding="utf-8")
            os.replace(partial, folder / WHOLE)
            # Not by the parent, which would remove the last whole one before this one is.
            rotate_checkpoints(str(self.args.output_dir), save_total_limit=self.keep_checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights, or an adapter's, which the parent looks for in peft's own class of models only."""
        if is_adapter(Path(resume_from_checkpoint)) and not self.is_fsdp_enabled:
            assert self.model is not None
            restore_adapter(unwrapped(self.model), Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the last checkpoint was the end already: the parent would make one more step."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def restore_step(self, checkpoint: Path) -> None:
        """Take the step's own state from a checkpoint; to be called as training begins."""
        state = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        self.combination.restore(state["combination"])
        self.log_sums = state["log_sums"]
        self.steps_logged = state["steps_logged"]
        self._tr_loss += state["loss_sum"]
        self._globalstep_last_logged = state["globalstep_last_logged"]


def _as_it_is(plan: WindowPlan) -> WindowPlan:
    return plan


def _listed(places: list[int]) -> str:
    shown = ", ".join(str(place + 1) for place in places[:8])
    return shown + (f" and {len(places) - 8} more" if len(places) > 8 else "")
