"""`transformers.Trainer` with the step of an unlearning method: one call of `training_step` is one optimizer step.

The parent's loop, schedules, logging, checkpoints and data-parallel wrappers are used unchanged. The work that the
parent does micro-batch by micro-batch is done here for a whole step batch, because both losses are normalised by the
step batch, and because some methods combine the two gradients of the step batch.
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
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from unlearning.checkpoints.load import without_bars
from unlearning.checkpoints.locate import is_adapter
from unlearning.checkpoints.lora import restore_adapter, save_adapter
from unlearning.checkpoints.save import complete_config
from unlearning.common.errors import InputError
from unlearning.data.order import StepPlan, StepSampler
from unlearning.methods.method import AnyMethod, Batch, StepBatch
from unlearning.objectives.combination import DualAscent, GradientCombination
from unlearning.objectives.dropout import without_dropout
from unlearning.objectives.forward import unwrapped
from unlearning.objectives.gradients import GradientAccumulator, Kept, gathered, placed_like, put, sum_over_ranks
from unlearning.options import TrainOptions
from unlearning.training.arguments import optimizer_class, step_batch_size
from unlearning.training.output_directory import KEPT_TENSORS, WHOLE
from unlearning.training.training_set import TrainingSet


class Diverged(InputError):
    """A loss or a gradient is not finite."""


@dataclass(frozen=True)
class _Pass:
    """One of the two losses over one step batch.

    Attributes:
        name: "forget" or "retain".
        weight: Weight of the loss; a loss of weight 0 is computed without its gradient.
        loss: The method's loss.
        batches: This process's micro-batches, each with the indices of its examples.
        n_batches: Number of micro-batches.
    """

    name: str
    weight: float
    loss: Any
    batches: Iterator[tuple[Batch, list[int]]]
    n_batches: int


class UnlearningTrainer(Trainer):
    """Run the parent's loop around a method's optimizer steps.

    Args:
        method: The unlearning method.
        method_options: The method's options.
        options: The trainer's options.
        model: The model to train, on its device.
        args: The parent's arguments (see `training_arguments`).
        training_set: The tokenised data.
    """

    def __init__(
        self,
        *,
        method: AnyMethod,
        method_options: Any,
        options: TrainOptions,
        model: PreTrainedModel,
        args: TrainingArguments,
        training_set: TrainingSet,
    ) -> None:
        """Set up the parent without its printing callback."""
        bfloat16 = any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
        super().__init__(
            model=model,
            args=args,
            train_dataset=training_set,
            optimizer_cls_and_kwargs=optimizer_class(options, bfloat16=bfloat16),
        )
        self.remove_callback(PrinterCallback)
        self.method = method
        self.method_options = method_options
        self.combination = method.combination(method_options)
        self.displacement = method.displacement(method_options) if method.displacement else None
        if self.displacement is not None and bfloat16:
            raise InputError(
                f"`precision` bfloat16 is not supported by {method.name}, which moves the weights by less than "
                "bfloat16 resolves. Set float32 or bf16_mixed."
            )
        parts: dict[str, Any] = {"combination": self.combination, "displacement": self.displacement}
        self.kept: dict[str, Kept] = {name: part for name, part in parts.items() if isinstance(part, Kept)}
        if self.kept and options.precision == "fp16_mixed":
            raise InputError(
                f"`precision` fp16_mixed is not supported by {method.name}, which keeps gradients from step to step: "
                "an overflow, which the loss scale expects, would stay. Set float32 or bf16_mixed."
            )
        # Two passes over the same examples must drop the same units, or none, and references are without dropout.
        self.steady = (
            bool(method.needs(method_options).references)
            or self.displacement is not None
            or method.statistic is not None
        )
        self.training_set = training_set
        self.batch_size = options.batch_size
        self.step_batch_size = step_batch_size(options, args.world_size)
        self.keep_checkpoints = max(1, options.keep_checkpoints)  # without one, a killed run could not go on
        self.log_sums: dict[str, float] = {}
        self.steps_logged = 0
        self.trained_names: list[str] = []
        # A bfloat16 sum over micro-batches would stop growing; float32 weights are summed by autograd.
        self.sums_wide = bfloat16
        self._kept_accumulator: GradientAccumulator | None = None
        self._read: list[int] = []

    def get_train_dataloader(self) -> DataLoader[StepPlan]:
        """Return a loader with one item per optimizer step: the examples that this process reads."""
        # The sampler yields plans where the annotations of torch expect lists of indices.
        sampler: Any = StepSampler(
            self.training_set.main_lengths(),
            self.training_set.retain_lengths(),
            seed=self.args.seed,
            batch_size=self.batch_size,
            step_batch_size=self.step_batch_size,
            rank=self.args.process_index,
            world=self.args.world_size,
        )
        unchanged: Any = _unchanged
        loader: Any = DataLoader(self.training_set, batch_sampler=sampler, collate_fn=unchanged)
        loader.set_epoch = sampler.set_epoch  # the parent calls it on the loader
        return loader

    def get_batch_samples(
        self,
        epoch_iterator: Iterator[Any],
        num_batches: int,
        device: torch.device,  # noqa: ARG002
    ) -> tuple[list[Any], None]:
        """Return the step's plans, without the parent's count of labels.

        Args:
            epoch_iterator: Iterator over the plans of the epoch.
            num_batches: Number of plans to return.
            device: Not used.

        Returns:
            The plans, and None for the number of labels.
        """
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: Any,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Float[Tensor, ""]:
        """Run all forward and backward passes of one optimizer step and leave its gradient in `.grad`.

        Args:
            model: The model, in its data-parallel wrapper.
            inputs: Plan of the step.
            num_items_in_batch: Not used.

        Returns:
            The weighted sum of the two losses over the step batch.
        """
        model.train()
        if self.method.start is not None and self.state.global_step == 0:
            parameters = self._accumulator(model).parameters
            with torch.no_grad():
                self.method.start(list(zip(self.trained_names, parameters, strict=True)), self.method_options)
        accumulator = self._accumulator(model) if self.sums_wide else None
        with (
            without_dropout(model) if self.steady else contextlib.nullcontext(),
            accumulator.at_once() if accumulator else contextlib.nullcontext(),
        ):
            return self._optimizer_step(model, inputs)

    def _optimizer_step(self, model: torch.nn.Module, inputs: Any) -> Float[Tensor, ""]:
        combination = self.combination if isinstance(self.combination, GradientCombination) else None
        accumulator = self._accumulator(model) if combination or self.sums_wide else None
        passes = self._passes(model, inputs)
        pairs = self.training_set.pairs
        self._read = [pairs[item][0] for item in inputs.main] if pairs else inputs.main
        values: dict[str, float] = {}
        moved: dict[str, float] = {}
        apart: list[list[Tensor]] = []
        last = max((place for place, part in enumerate(passes) if part.weight), default=None)
        for place, part in enumerate(passes):
            # Gradients are reduced across processes once per step: in the last backward pass, or when combined.
            reduce_at = part.n_batches if place == last and not accumulator else 0
            with self._displaced(model, inputs, part, moved):
                values[part.name] = self._backward(model, part, reduce_at, accumulator)
            if combination and accumulator:
                apart.append(accumulator.take())
        logs = moved | {f"{name}_loss": value for name, value in values.items()}
        if combination and accumulator:
            logs |= self._combine(combination, accumulator, *apart)
        elif accumulator:
            reached, sums = accumulator.take_reached()
            self._whole(sums)
            put(reached[::-1], (sums.pop() for _ in reached))  # each sum is freed as soon as it is put
        logs |= self.combination.after_step(values.get("retain"))
        for name, logged in logs.items():
            self.log_sums[name] = self.log_sums.get(name, 0.0) + logged
        total = sum(part.weight * values[part.name] for part in passes)
        return torch.tensor(total, dtype=torch.float32, device=self.args.device)

    def _passes(self, model: torch.nn.Module, plan: StepPlan) -> list["_Pass"]:
        """Return the losses whose weight is not 0, forget first; a multiplier needs its loss at any weight.

        The passes run one after the other, so that only one graph is in memory.
        """
        data, device = self.training_set, self.args.device
        step_batch = data.step_batch(plan, progress=self._progress())
        gamma, alpha = self.combination.weights()
        passes = []
        if self.method.forget_loss is not None and gamma:
            statistic = self._statistic("forget", model, plan, step_batch)
            batches = data.forget_batches(plan, step_batch, device, statistic)
            passes.append(_Pass("forget", gamma, self.method.forget_loss, batches, len(plan.main_batches)))
        learns = isinstance(self.combination, DualAscent)
        if self.method.retain_loss is not None and data.retain and (alpha or learns):
            n_batches = len(plan.retain_batches if data.pairs else plan.main_batches)
            statistic = self._statistic("retain", model, plan, step_batch)
            batches = data.retain_batches(plan, step_batch, device, statistic)
            passes.append(_Pass("retain", alpha, self.method.retain_loss, batches, n_batches))
        return passes

    @contextlib.contextmanager
    def _displaced(
        self, model: torch.nn.Module, plan: StepPlan, part: "_Pass", logs: dict[str, float]
    ) -> Iterator[None]:
        """Move the weights where the method takes its forget gradient beside them, and put them back to the bit."""
        if self.displacement is None or part.name != "forget":
            yield
            return
        parameters = self._accumulator(model).parameters
        present = [parameter.detach().clone() for parameter in parameters]
        try:
            logs |= self.displacement.move(
                parameters, lambda loss: self._forget_gradient(model, plan, loss or part.loss), self.state.global_step
            )
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, present, strict=True):
                    parameter.copy_(before)

    def _forget_gradient(self, model: torch.nn.Module, plan: StepPlan, loss: Any) -> list[Tensor]:
        """Return the gradient of a loss over the forget examples of the whole step batch, on all processes."""
        data, accumulator = self.training_set, self._accumulator(model)
        step_batch = data.step_batch(plan, progress=self._progress())
        batches = data.forget_batches(plan, step_batch, self.args.device, None)
        with torch.enable_grad():
            self._backward(model, _Pass("forget", 1.0, loss, batches, len(plan.main_batches)), 0, accumulator)
        return self._whole(accumulator.take())

    def _backward(
        self, model: torch.nn.Module, part: "_Pass", reduce_at: int, accumulator: GradientAccumulator | None
    ) -> float:
        """Run forward and backward over all micro-batches of a loss; forward alone if its weight is 0.

        Args:
            model: The model, in its data-parallel wrapper.
            part: The loss and its micro-batches.
            reduce_at: Number (from 1) of the micro-batch whose backward pass reduces gradients across processes; 0 for
                none.
            accumulator: Adds up the gradients of this loss alone; None to leave them in `.grad`.

        Returns:
            The loss of the step batch, over all processes, before its weight.
        """
        shares: list[tuple[Float[Tensor, ""], list[int]]] = []
        for batch, indices in part.batches:  # `enumerate` would keep a reference to the batch
            if not part.weight:
                with torch.no_grad():
                    value = part.loss(model, batch, self.method_options)
                shares.append((value.double() * (1 if indices else 0), indices))
                continue
            with contextlib.nullcontext() if len(shares) + 1 == reduce_at else self._not_reduced(model):
                value = part.loss(model, batch, self.method_options)
                del batch  # so that reference logits are freed as soon as the backward pass has used them
                if not value.requires_grad:
                    raise InputError(
                        f"`train_parameters` must include parameters that the {part.name} loss of {self.method.name} "
                        "depends on; none of the trained parameters has a gradient. Choose other parameters."
                    )
                # A batch without indices belongs to another process and runs only to keep the processes in step.
                shares.append((value.detach().double() * (1 if indices else 0), indices))
                # A data-parallel wrapper averages over processes; the loss is a sum over them.
                weight = part.weight * self.args.world_size if indices else 0.0
                self.accelerator.backward(weight * value)
            if accumulator:
                accumulator.add()
        return self._total(part.name, shares)

    def _statistic(self, name: str, model: torch.nn.Module, plan: StepPlan, step_batch: StepBatch) -> float | None:
        """Return the method's statistic over the step batch, on all processes; None if it is not of these examples."""
        if self.method.statistic is None or self.method.statistic_of != name:
            return None
        data = self.training_set
        read = data.forget_batches if name == "forget" else data.retain_batches
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for batch, indices in read(plan, step_batch, self.args.device, None):
                total, count = self.method.statistic(model, batch, self.method_options)  # type: ignore[arg-type]
                if indices:
                    sums += torch.tensor([total, count], dtype=torch.float64)
        total, count = self._summed(sums).tolist()
        return total / count if count else 0.0

    def _accumulator(self, model: torch.nn.Module) -> GradientAccumulator:
        """Return the gradient accumulator, made at the first step: only then does the wrapper hold the parameters."""
        if self._kept_accumulator is None:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # an evaluation leaves full parameters in place of the trained shards
            trained = [(n, p) for n, p in unwrapped(model).named_parameters() if p.requires_grad]
            self.trained_names = [name for name, _ in trained]
            self._kept_accumulator = GradientAccumulator([parameter for _, parameter in trained])
        return self._kept_accumulator

    def _combine(
        self,
        combination: GradientCombination,
        accumulator: GradientAccumulator,
        forget: list[Tensor],
        retain: list[Tensor],
    ) -> dict[str, float]:
        """Put the direction into `.grad`, given the forget and the retain gradient of the whole step batch."""
        self._whole([*forget, *retain])
        direction, logs = combination.combine(forget, retain, self.trained_names)
        scale = self._loss_scale()
        if scale != 1:
            for gradient in direction:
                gradient.mul_(scale)
        put(accumulator.parameters, direction)
        return logs

    def _whole(self, gradients: list[Tensor]) -> list[Tensor]:
        """Sum this process's gradients over all processes, in place, without the float16 scale and FSDP's factor."""
        # Losses were multiplied by the number of processes, which FSDP's mean undoes; without FSDP it is undone here.
        factor = self._loss_scale() * (1 if self.is_fsdp_enabled else self.args.world_size)
        if factor != 1:
            for gradient in gradients:
                gradient.mul_(1 / factor)
        sum_over_ranks(gradients)
        return gradients

    def _loss_scale(self) -> float:
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _total(self, name: str, shares: list[tuple[Float[Tensor, ""], list[int]]]) -> float:
        """Return the loss of the whole step batch over all processes; raise on all of them if it is not finite."""
        total = float(self._summed(torch.stack([share for share, _ in shares]).sum().cpu().reshape(1))[0])
        if not math.isfinite(total):
            bad = [f"{name} examples {_listed(used)}" for share, used in shares if not math.isfinite(float(share))]
            where = bad[0] if bad else "a batch of another process"
            raise Diverged(f"the {name} loss of {self.method.name} is {total} at {self._step()}, in {where}")
        return total

    def _step(self) -> str:
        return f"step {self.state.global_step + 1} of {self.state.max_steps}"

    def _progress(self) -> float:
        return self.state.global_step / self.state.max_steps

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm before clipping; raise before the optimizer steps if the norm is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # With a float16 loss scale an overflow is expected: the scaler skips the step.
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
        # FSDP would keep full gradients in memory if they were not reduced.
        if self.args.world_size == 1 or self.accelerator.distributed_type == DistributedType.FSDP:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002
        """Return 0: the parent's estimate needs inputs with a single `input_ids`."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line, with the means over the steps since the last line of what the steps logged.

        Args:
            logs: Values of the line.
            start_time: Passed on to the parent.
        """
        if "loss" in logs:
            n_steps = self.state.global_step - self.steps_logged
            logs |= {name: total / n_steps for name, total in self.log_sums.items()}
            self.log_sums = {}
            self.steps_logged = self.state.global_step
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights and configuration, or the adapter alone; every process must call it under FSDP.

        Args:
            output_dir: Directory to write to; by default that of the checkpoints.
            _internal_call: Passed on to the parent.
        """
        assert self.model is not None
        target = Path(output_dir or str(self.args.output_dir))
        with without_bars():
            if self.args.should_save and hasattr(self.model, "peft_config") and not self.is_fsdp_enabled:
                save_adapter(unwrapped(self.model), target)
            else:
                super().save_model(str(target), _internal_call)
        if self.args.should_save:
            complete_config(target, unwrapped(self.model).name_or_path or "")
        (target / "training_args.bin").unlink(missing_ok=True)  # a pickle that is never read

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        with without_bars():
            super()._save_checkpoint(model, trial)
        tensors = {
            f"{part}.{name}": gathered(tensor)
            for part, kept in self.kept.items()
            for name, tensor in zip(self.trained_names, kept.tensors, strict=True)
        }
        if self.args.should_save:
            state = {
                "combination": self.combination.state(),
                "log_sums": self.log_sums,
                "steps_logged": self.steps_logged,
                "loss_sum": float(self._tr_loss),
                "globalstep_last_logged": self._globalstep_last_logged,
            }
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            if tensors:
                save_file(tensors, folder / KEPT_TENSORS)
            partial = folder / f".{WHOLE}.partial"
            partial.write_text(json.dumps(state), encoding="utf-8")
            os.replace(partial, folder / WHOLE)
            # The parent would remove the last complete checkpoint before this one is complete.
            rotate_checkpoints(str(self.args.output_dir), save_total_limit=self.keep_checkpoints)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights, or those of an adapter, which the parent supports for peft's model classes only."""
        if is_adapter(Path(resume_from_checkpoint)) and not self.is_fsdp_enabled:
            assert self.model is not None
            restore_adapter(unwrapped(self.model), Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the last checkpoint was the end of the run: the parent would make one more step."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def restore_step(self, checkpoint: Path) -> None:
        """Restore the state of the step from a checkpoint, when training begins."""
        state = json.loads((checkpoint / WHOLE).read_text(encoding="utf-8"))
        self.combination.restore(state["combination"])
        if self.kept:
            saved, parameters = load_file(checkpoint / KEPT_TENSORS), self._accumulator(self.model_wrapped).parameters
            for part, kept in self.kept.items():
                tensors = [saved[f"{part}.{name}"] for name in self.trained_names]
                kept.tensors = [placed_like(t, p) for t, p in zip(tensors, parameters, strict=True)]
        self.log_sums = state["log_sums"]
        self.steps_logged = state["steps_logged"]
        self._tr_loss += state["loss_sum"]
        self._globalstep_last_logged = state["globalstep_last_logged"]


def _unchanged(plan: StepPlan) -> StepPlan:
    return plan


def _listed(indices: list[int]) -> str:
    """Return the numbers (from 1) of the first examples."""
    shown = ", ".join(str(index + 1) for index in indices[:8])
    return shown + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
