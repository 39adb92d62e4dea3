"""One trainer for every method, on `transformers.Trainer`."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from unlearning.checkpoints import content_hash, load_tokenizer, load_weights, locate_checkpoint
from unlearning.data.batches import PairSampler, collate, encode_examples
from unlearning.data.question_answer import Example, read_examples
from unlearning.data.spans import AnswerSpan
from unlearning.errors import InputError
from unlearning.forward import reference_nll
from unlearning.methods import get_method
from unlearning.methods.method import AnyMethod, Batch, Window
from unlearning.options import TrainOptions, resolve_options
from unlearning.progress import ProgressBar
from unlearning.saving import hash_examples, library_versions, read_finished, save_run

Data = str | Path | Sequence[Example]


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how it came about.

    Attributes:
        model: in eval mode, in float32, on the device that it was trained on.
        tokenizer: the one that it was trained with.
        history: every `logging_steps` optimizer steps: step, epoch, loss, its terms before their weights
            (forget_loss, retain_loss), grad_norm before clipping, learning_rate. Losses are means since the last line.
        options: all options, resolved.
        already_done: true if the output directory held this very run already, and nothing was trained.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, float]]
    options: dict[str, Any]
    already_done: bool = False


def train(
    method: str,
    *,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    forget: Data | None,
    retain: Data | None,
    output_dir: str | Path | None,
    progress: bool,
    options: Mapping[str, Any],
) -> TrainResult:
    """See `unlearning.train`."""
    chosen = get_method(method)
    method_options, train_options = resolve_options(method, chosen.options, dict(options))
    resolved = {**asdict(method_options), **asdict(train_options)}
    device = _device(train_options.device)
    _check_needs(chosen, method_options, forget=forget, retain=retain)
    uses_retain = chosen.uses_retain(method_options)
    forget_examples = _examples("forget", forget, train_options.template)
    retain_examples = _examples("retain", retain, train_options.template) if uses_retain else None

    configuration = {
        "method": method,
        "options": {name: value for name, value in resolved.items() if name != "device"},
        "forget_data": hash_examples(forget_examples),
        "retain_data": hash_examples(retain_examples),
    }
    output = None if output_dir is None else Path(output_dir)
    if output is not None:
        read_finished(output, configuration)  # refuse before the model is loaded
    name = str(model.name_or_path if isinstance(model, PreTrainedModel) else model)
    model, tokenizer = _start(model, tokenizer)
    if output is not None:
        configuration["start_weights"] = content_hash(model, name=name)
        record = read_finished(output, configuration)
        if record is not None:
            return TrainResult(load_weights(output), tokenizer, record["history"], resolved, already_done=True)

    limit = train_options.max_length or getattr(model.config, "max_position_embeddings", None)
    encoded = {
        name: encode_examples(tokenizer, examples, append_eos=train_options.append_eos, max_length=limit)
        for name, examples in (("forget", forget_examples), ("retain", retain_examples))
        if examples is not None
    }
    _check_vocabulary(model, encoded)
    model.to(device)  # type: ignore[arg-type]
    reference = None
    if chosen.uses_reference:
        reference = reference_nll(model, encoded["forget"], batch_size=train_options.batch_size)
    dataset = PairedExamples(encoded.get("forget"), encoded.get("retain"), reference)
    history = _run(chosen, method_options, train_options, model, dataset, device, progress)

    if output is not None:
        record = {
            "configuration": configuration,
            "model": name,
            "device": str(device),
            "versions": library_versions(),
            "history": history,
        }
        save_run(output, model, tokenizer, record)
    return TrainResult(model, tokenizer, history, resolved)


@dataclass(frozen=True)
class PairedExamples(Dataset[tuple[int, int]]):
    """The encoded data; an item is a pair of places, as `PairSampler` yields them, and `batch` looks them up."""

    forget: list[AnswerSpan] | None
    retain: list[AnswerSpan] | None
    reference: Float[Tensor, " forget"] | None

    def __len__(self) -> int:
        main = self.retain if self.forget is None else self.forget
        assert main is not None
        return len(main)

    def __getitem__(self, pair: tuple[int, int]) -> tuple[int, int]:
        return pair

    def sampler(self, seed: int) -> PairSampler:
        """The order of the pairs: forget with retain, or retain alone."""
        paired = self.forget is not None and self.retain is not None
        return PairSampler(len(self), len(self.retain) if paired and self.retain else 0, seed=seed)

    def batch(self, pairs: list[tuple[int, int]]) -> dict[str, Any]:
        """The collator: a dictionary, as the trainer wants it, of up to two TokenBatches."""
        main = [first for first, _ in pairs]
        if self.forget is None:
            assert self.retain is not None
            return {"retain": collate([self.retain[index] for index in main])}
        reference = None if self.reference is None else self.reference[main]
        batch = {"forget": collate([self.forget[index] for index in main], reference_nll=reference)}
        if self.retain is not None:
            batch["retain"] = collate([self.retain[index] for _, index in pairs])
        return batch


class UnlearningTrainer(Trainer):
    """`transformers.Trainer` with the method's loss, its window's normalisation and the paired order."""

    # The loss is normalised by the whole accumulation window, so its micro-batches are summed, not averaged.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        method: AnyMethod,
        method_options: Any,
        model: PreTrainedModel,
        args: TrainingArguments,
        dataset: PairedExamples,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=dataset, data_collator=dataset.batch, callbacks=callbacks
        )
        self.remove_callback(PrinterCallback)
        self.method = method
        self.method_options = method_options
        self.pairs = dataset
        self.term_sums: dict[str, float] = {}
        self.steps_logged = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:  # noqa: ARG002
        return self.pairs.sampler(self.args.seed)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The window's micro-batches, and the window's sizes in place of the parent's count of labels."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        window = Window(
            forget_sequences=sum(s["forget"].n_sequences for s in samples if "forget" in s),
            forget_tokens=sum(s["forget"].n_answer_tokens for s in samples if "forget" in s),
            retain_sequences=sum(s["retain"].n_sequences for s in samples if "retain" in s),
            retain_tokens=sum(s["retain"].n_answer_tokens for s in samples if "retain" in s),
        )
        return samples, window

    def compute_loss(  # type: ignore[override]
        self,
        model: PreTrainedModel,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: ARG002
        num_items_in_batch: Window | None = None,
    ) -> Float[Tensor, ""]:
        """The method's loss, refused where it is not finite."""
        assert num_items_in_batch is not None
        batch = Batch(forget=inputs.get("forget"), retain=inputs.get("retain"), window=num_items_in_batch)
        loss = self.method.step(model, batch, self.method_options)
        if not torch.isfinite(loss.total):
            raise InputError(
                f"the loss is {loss.total.item()} at step {self.state.global_step + 1} of {self.state.max_steps}: "
                "training diverged, nothing was saved; lower learning_rate or the number of epochs"
            )
        for name, term in (("forget_loss", loss.forget), ("retain_loss", loss.retain)):
            if term is not None:
                self.term_sums[name] = self.term_sums.get(name, 0.0) + term.item()
        return loss.total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # noqa: ARG002
        """Not counted: the parent's estimate wants a single `input_ids`."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the loss's two terms, as means over the steps since the last line."""
        if "loss" in logs:
            n_steps = self.state.global_step - self.steps_logged
            logs |= {name: total / n_steps for name, total in self.term_sums.items()}
            self.term_sums = {}
            self.steps_logged = self.state.global_step
        super().log(logs, start_time)


def _run(
    method: AnyMethod,
    method_options: Any,
    options: TrainOptions,
    model: PreTrainedModel,
    dataset: PairedExamples,
    device: torch.device,
    progress: bool,
) -> list[dict[str, float]]:
    bar = ProgressBar(method.name, show=progress)
    with tempfile.TemporaryDirectory() as scratch, _restored_config(model):
        trainer = UnlearningTrainer(
            method=method,
            method_options=method_options,
            model=model,
            args=_training_arguments(options, len(dataset), device, scratch),
            dataset=dataset,
            callbacks=[bar],
        )
        try:
            trainer.train()
        finally:
            bar.close()
            model.zero_grad(set_to_none=True)
            model.eval()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} is not finite after the last step, nothing was saved; lower learning_rate")
    return [dict(line) for line in trainer.state.log_history if "loss" in line]


def _training_arguments(
    options: TrainOptions, n_examples: int, device: torch.device, scratch: str
) -> TrainingArguments:
    micro_batches = math.ceil(n_examples / options.batch_size)
    steps = options.max_steps or options.epochs * math.ceil(micro_batches / options.gradient_accumulation_steps)
    schedule = "constant_with_warmup" if options.lr_schedule == "constant" else options.lr_schedule
    args = TrainingArguments(
        output_dir=scratch,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        lr_scheduler_type=schedule,
        warmup_steps=int(options.warmup_ratio * steps),  # down, so that a single step is not all warm-up
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # One device: on a machine with several GPUs the parent would wrap the model in DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _start(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to start from, in float32, and its tokenizer."""
    if not isinstance(model, PreTrainedModel):
        path = locate_checkpoint(model)
        return load_weights(path), tokenizer or load_tokenizer(path)
    if tokenizer is None:
        path = Path(str(model.name_or_path))
        if not model.name_or_path or not path.is_dir():
            raise InputError("a loaded model has no directory to take a tokenizer from; pass tokenizer=...")
        tokenizer = load_tokenizer(path)
    return model.float(), tokenizer


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("device=cuda: this machine has no CUDA device; use device=cpu")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def _check_needs(method: AnyMethod, options: Any, *, forget: Data | None, retain: Data | None) -> None:
    if method.uses_forget and forget is None:
        raise InputError(f"{method.name} needs forget data; give --forget FILE (forget=... in Python)")
    if not method.uses_forget and forget is not None:
        raise InputError(f"{method.name} has no use for forget data; leave --forget out")
    if method.uses_retain(options) and retain is None:
        weight = " or set alpha=0" if hasattr(options, "alpha") else ""
        raise InputError(f"{method.name} needs retain data; give --retain FILE (retain=... in Python){weight}")


def _examples(name: str, data: Data | None, template: str) -> list[Example] | None:
    if data is None:
        return None
    if isinstance(data, (str, Path)):
        return read_examples(data, template)
    examples = list(data)
    if not examples:
        raise InputError(f"the {name} data is empty; give at least one example")
    for place, example in enumerate(examples):
        if not isinstance(example, Example):
            raise InputError(f"{name}[{place}] is {type(example).__name__}; give unlearning.Example(prompt, answer)")
    return examples


def _check_vocabulary(model: PreTrainedModel, encoded: Mapping[str, list[AnswerSpan]]) -> None:
    size = int(model.config.get_text_config().vocab_size)
    largest = max(max(span.input_ids) for spans in encoded.values() for span in spans)
    if largest >= size:
        raise InputError(
            f"the tokenizer gives token {largest}, the model has {size}; use the tokenizer that belongs to the model"
        )


@contextmanager
def _restored_config(model: PreTrainedModel) -> Iterator[None]:
    """The parent switches the key-value cache off in the model's configuration, which would be saved with it."""
    use_cache = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache
