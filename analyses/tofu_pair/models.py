r"""The real pair's models: a pretrained model, a base that knows all authors, a control, and two unlearned models.

    trunk --- + all authors ------> base --- NPO, GradDiff ---> npo, grad_diff
        \---- + retain authors ---> never

The directories of the pretrained model and the control are called `trunk` and `never`. Each stage writes one model
directory as a whole, and is skipped if the directory exists with the same configuration.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import unlearning
from analyses.tofu_pair.data import Subset, as_examples
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.common.errors import InputError
from unlearning.data.records import Record
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.metrics.text_match import exact_match, rouge_l_recall

logger = logging.getLogger(__name__)

STAGE = "stage.json"
END_OF_TEXT = "<|endoftext|>"
UNLEARNED = ("npo", "grad_diff")
MODELS = ("trunk", "base", "never", *UNLEARNED)


@dataclass(frozen=True)
class Schedule:
    """How one stage trains.

    Attributes:
        epochs: Numbers of passes to try, from the smallest on, each from the stage's start; over the stage's examples,
            in unlearning over the forget examples.
        learning_rate: Peak learning rate of AdamW.
        batch_size: Examples per optimizer step; in unlearning, as many retain examples are added.
        lr_schedule: Schedule after the warm-up: linear, cosine or constant.
        warmup_ratio: Share of the steps for the warm-up.
        gamma: Weight of the forget term (unlearning).
        alpha: Weight of the retain term (unlearning).
    """

    epochs: tuple[int, ...]
    learning_rate: float
    batch_size: int = 8
    lr_schedule: str = "cosine"
    warmup_ratio: float = 0.05
    gamma: float = 1.0
    alpha: float = 1.0


@dataclass(frozen=True)
class Architecture:
    """Sizes of the Llama-architecture models; embeddings are tied. The default has 5.8 million parameters."""

    vocab_size: int = 4096
    d_model: int = 256
    d_mlp: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 4
    context: int = 256


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the models, besides the data.

    Attributes:
        trunk_authors, late_authors, forget_authors: Number of authors in each part of the subset.
        architecture: Sizes of the models and of the tokenizer's vocabulary.
        trunk, base, npo, grad_diff: The schedules; the control takes as many steps as the base.
        base_recall: Mean ROUGE-L recall that the base must reach on forget and retain questions.
        forget_margin: How much an unlearned model's recall on the forget questions may exceed the control's.
        retain_floor: Mean ROUGE-L recall that unlearned models must keep on the retain questions: on the pretrained
            model's authors and on the late ones, which undoing the fine-tuning would lose together with the forget
            authors.
        seed: Random seed of the subset, the weights and the orders of the examples.
    """

    trunk_authors: int = 27
    late_authors: int = 5
    forget_authors: int = 8
    architecture: Architecture = Architecture()
    trunk: Schedule = Schedule(epochs=(22,), learning_rate=1.5e-3)
    base: Schedule = Schedule(epochs=(10, 15), learning_rate=1.2e-3)
    # NPO's forget term sums over an answer's tokens (about 35), whereas the retain term is a mean over tokens: with
    # alpha 1 the retain answers fall with the forget answers (measured: 0.55 retain recall at 0.09 forget recall).
    npo: Schedule = Schedule(epochs=(2, 4, 6, 8, 12), learning_rate=1.5e-4, alpha=30.0)
    grad_diff: Schedule = Schedule(epochs=(6, 7, 8, 10), learning_rate=2.5e-4, gamma=0.05)
    base_recall: float = 0.9
    forget_margin: float = 0.08
    retain_floor: float = 0.8
    seed: int = 0

    def with_authors(self, n_authors: int) -> "Recipe":
        """Change the number of authors: one in five to forget, one in eight late.

        Returns:
            The changed recipe.

        Raises:
            InputError: There are fewer than three authors.
        """
        forget, late = max(1, round(n_authors / 5)), max(1, round(n_authors / 8))
        if n_authors - forget - late < 1:
            raise InputError(f"`authors` must be at least 3, got {n_authors}")
        return replace(self, trunk_authors=n_authors - forget - late, late_authors=late, forget_authors=forget)


@dataclass(frozen=True)
class Quality:
    """How well a model answers, greedily.

    Attributes:
        rouge_l_recall: Mean over the questions, in [0, 1].
        exact_match: Share of the answers that are exactly right.
        questions: Number of questions.
    """

    rouge_l_recall: float
    exact_match: float
    questions: int


def measure_quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, batch_size: int = 32
) -> Quality:
    """Measure ROUGE-L recall and exact match of the greedy answers to the records' questions.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        records: The records.
        batch_size: Maximum number of questions in one batch.

    Returns:
        The means.
    """
    examples = as_examples(list(records))
    longest = max(len(tokenizer(f" {record['answer']}")["input_ids"]) for record in records)
    answers = greedy_answers(
        model, tokenizer, [example.prompt for example in examples], max_new_tokens=longest + 1, batch_size=batch_size
    )
    recalls = [rouge_l_recall(answer, record["answer"]) or 0.0 for answer, record in zip(answers, records, strict=True)]
    exact = [exact_match(answer, record["answer"]) for answer, record in zip(answers, records, strict=True)]
    return Quality(sum(recalls) / len(recalls), sum(exact) / len(exact), len(records))


def train_tokenizer(texts: Sequence[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with one special token, which ends a text and pads.

    Args:
        texts: Texts to train on.
        vocab_size: Size of the vocabulary.
        context: Maximum length of the models' texts, in tokens.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=context
    )


def new_model(sizes: Architecture, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a model with random weights, which are the same for the same seed.

    Args:
        sizes: Sizes of the model.
        tokenizer: Its tokenizer.
        seed: Random seed of the weights.

    Returns:
        The model.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.d_model,
        intermediate_size=sizes.d_mlp,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        max_position_embeddings=sizes.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Workshop:
    """Directory, data and recipe of the models.

    Attributes:
        recipe: Everything that decides the models.
        subset: Records of the authors.
        folder: Directory with one directory per model.
        device: auto, cpu or cuda.
        progress: Whether to show progress bars on stderr.
    """

    recipe: Recipe
    subset: Subset
    folder: Path
    device: str = "auto"
    progress: bool = True

    def build(self) -> dict[str, dict[str, Any]]:
        """Train the models that do not exist yet, in order.

        Returns:
            The record of each model's stage.

        Raises:
            InputError: A directory holds a model of another configuration, or a stage misses its aim.
        """
        return {
            **self.build_base(),
            "never": self.build_never("never", self.subset.retain),
            **{name: self._stage(name, "base", self._unlearner(name)) for name in UNLEARNED},
        }

    def build_base(self) -> dict[str, dict[str, Any]]:
        """Train pretrained model and base if they do not exist yet.

        Returns:
            The record of each stage.

        Raises:
            InputError: A directory holds a model of another configuration, or the base misses its aim.
        """
        return {
            "trunk": self._stage("trunk", None, self._train_trunk),
            "base": self._stage("base", "trunk", self._train_base),
        }

    def build_never(self, name: str, known: Sequence[Record]) -> dict[str, Any]:
        """Train a control: from the pretrained model, in as many steps as the base, on these records only.

        Args:
            name: Name of its directory.
            known: The records; for `never`, those of all retain authors.

        Returns:
            The record of the stage.

        Raises:
            InputError: The directory holds a model of another configuration.
        """
        return self._stage(name, "trunk", lambda output: self._train_never(output, known), known=known)

    @property
    def torch_device(self) -> torch.device:
        """Device on which models answer; the trainer resolves the same words in the same way."""
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    def directory(self, name: str) -> Path:
        """Return the directory of a model."""
        return self.folder / name

    def _stage(
        self,
        name: str,
        parent: str | None,
        make: Callable[[Path], dict[str, Any]],
        *,
        known: Sequence[Record] | None = None,
    ) -> dict[str, Any]:
        """Train a model unless its directory exists with the same fingerprint, and return the stage's record."""
        target = self.directory(name)
        fingerprint = self._fingerprint(name, known)
        if target.exists():
            return _read_stage(target, fingerprint)
        scratch = self.folder / f".{name}.partial"
        shutil.rmtree(scratch, ignore_errors=True)  # left by an interrupted run
        logger.info("training %s", name)
        start, start_cpu = time.perf_counter(), time.process_time()
        found = make(scratch)
        record = {
            "name": name,
            "from": parent,
            "fingerprint": fingerprint,
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - start_cpu, 1),
            "threads": torch.get_num_threads(),
            **found,
        }
        (scratch / STAGE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, target)
        return record

    def _fingerprint(self, name: str, known: Sequence[Record] | None = None) -> str:
        """Return the SHA-256 of everything that decides a model: data, sizes, seed, and its schedule and earlier ones.

        `known` holds the records that a control is trained on, if these are not all of the retain authors'.
        """
        recipe = self.recipe
        if name == "trunk":
            parts = [self.subset.digest, asdict(recipe.architecture), recipe.seed, asdict(recipe.trunk)]
        elif name == "base":
            parts = [self._fingerprint("trunk"), asdict(recipe.base), recipe.base_recall]
        elif name == "never":
            parts = [self._fingerprint("base")]  # the base decides the number of steps
        elif known is not None:
            parts = [self._fingerprint("base"), [record["id"] for record in known]]
        else:
            schedule = asdict(getattr(recipe, name))
            parts = [self._fingerprint("never"), schedule, recipe.forget_margin, recipe.retain_floor]
        return hashlib.sha256(json.dumps([name, *parts]).encode()).hexdigest()

    def _train(
        self,
        method: str,
        start: str | Path | PreTrainedModel,
        schedule: Schedule,
        output: Path,
        **data: Any,
    ) -> PreTrainedModel:
        """Train with a schedule; `data` are the texts, the tokenizer and `epochs` or `max_steps`, for `unlearning`."""
        weights: dict[str, Any] = {} if method == "finetune" else {"gamma": schedule.gamma, "alpha": schedule.alpha}
        return unlearning.train(
            method,
            model=start,
            output_dir=output,
            progress=self.progress,
            learning_rate=schedule.learning_rate,
            batch_size=schedule.batch_size,
            gradient_accumulation_steps=1,
            lr_schedule=schedule.lr_schedule,
            warmup_ratio=schedule.warmup_ratio,
            weight_decay=0.0,
            seed=self.recipe.seed,
            device=self.device,
            **data,
            **weights,
        ).model

    def _train_trunk(self, output: Path) -> dict[str, Any]:
        recipe, subset = self.recipe, self.subset
        texts = [f"{e.prompt} {e.answer}" for e in as_examples(subset.retain + subset.forget)]
        tokenizer = train_tokenizer(texts, recipe.architecture.vocab_size, recipe.architecture.context)
        model = new_model(recipe.architecture, tokenizer, recipe.seed)
        examples = as_examples(subset.trunk)
        epochs = recipe.trunk.epochs[0]
        self._train("finetune", model, recipe.trunk, output, retain=examples, tokenizer=tokenizer, epochs=epochs)
        return {"epochs": epochs, "steps": epochs * math.ceil(len(examples) / recipe.trunk.batch_size)}

    def _train_base(self, output: Path) -> dict[str, Any]:
        """Fine-tune the pretrained model on all authors, with the fewest passes that make it answer."""
        recipe, schedule = self.recipe, self.recipe.base
        examples = as_examples(self.subset.retain + self.subset.forget)
        attempts = []
        for epochs in schedule.epochs:
            shutil.rmtree(output, ignore_errors=True)
            model = self._train("finetune", self.directory("trunk"), schedule, output, retain=examples, epochs=epochs)
            recalls = self._recalls(model)
            attempts.append({"epochs": epochs, **recalls})
            if min(recalls.values()) >= recipe.base_recall:
                steps = epochs * math.ceil(len(examples) / schedule.batch_size)
                return {"epochs": epochs, "steps": steps, "attempts": attempts}
        raise InputError(
            f"base: ROUGE-L recall is {min(recalls.values()):.2f} after {epochs} epochs, below {recipe.base_recall}. "
            "Train it longer (Recipe.base.epochs)"
        )

    def _train_never(self, output: Path, known: Sequence[Record]) -> dict[str, Any]:
        steps = json.loads((self.directory("base") / STAGE).read_text(encoding="utf-8"))["steps"]
        self._train(
            "finetune",
            self.directory("trunk"),
            self.recipe.base,
            output,
            retain=as_examples(list(known)),
            max_steps=steps,
        )
        return {"steps": steps}

    def _unlearner(self, method: str) -> Callable[[Path], dict[str, Any]]:
        """Return a function that unlearns with the fewest passes that bring forget answers down to the control's level.

        The other answers must be kept.
        """
        schedule: Schedule = getattr(self.recipe, method)
        forget, retain = as_examples(self.subset.forget), as_examples(self.subset.retain)

        def make(output: Path) -> dict[str, Any]:
            level = self._recalls(load_weights(self.directory("never")))["forget"]
            attempts = []
            for epochs in schedule.epochs:
                shutil.rmtree(output, ignore_errors=True)
                model = self._train(
                    method, self.directory("base"), schedule, output, forget=forget, retain=retain, epochs=epochs
                )
                recalls = self._recalls(model)
                attempts.append({"epochs": epochs, **recalls})
                logger.info("%s", attempts[-1])
                gone = recalls["forget"] <= level + self.recipe.forget_margin
                kept = min(recalls["trunk"], recalls["late"]) >= self.recipe.retain_floor
                if gone and kept:
                    break
            else:
                raise InputError(
                    f"{method}: after {epochs} epochs ROUGE-L recall is {recalls['forget']:.2f} on forget questions "
                    f"(control: {level:.2f}), {recalls['trunk']:.2f} and {recalls['late']:.2f} on the pretrained "
                    f"model's and the late retain authors'. Change Recipe.{method}"
                )
            steps = epochs * math.ceil(len(forget) / schedule.batch_size)
            return {"epochs": epochs, "steps": steps, "never_forget_recall": level, "attempts": attempts}

        return make

    def _recalls(self, model: PreTrainedModel) -> dict[str, float]:
        """Return mean ROUGE-L recall on the forget questions, and on about as many of each kind of retain question."""
        tokenizer = load_tokenizer(self.directory("trunk"))
        model.to(self.torch_device)  # type: ignore[arg-type]
        subset, n = self.subset, len(self.subset.forget)
        parts = {"forget": subset.forget, "trunk": _spread(subset.trunk, n), "late": _spread(subset.late, n)}
        return {name: round(measure_quality(model, tokenizer, part).rouge_l_recall, 4) for name, part in parts.items()}


def _spread(records: list[Record], n: int) -> list[Record]:
    """Return about n of the records, evenly spread over the authors."""
    return records[:: max(1, len(records) // n)]


def _read_stage(directory: Path, fingerprint: str) -> dict[str, Any]:
    """Return the record of a finished stage.

    Raises:
        InputError: The directory holds something else.
    """
    try:
        record = json.loads((directory / STAGE).read_text(encoding="utf-8"))
        done = record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{directory}: holds other files. Give another directory as `out`, or remove it") from None
    if done != fingerprint:
        raise InputError(
            f"{directory}: holds a model of another recipe, seed or data. Give another directory as `out`, or remove it"
        )
    return record
