"""The real pair's models: one trunk, a base that knows all authors, a never, and two unlearned models.

    trunk --- + all authors ------> base --- NPO, GradDiff ---> npo, grad_diff
        \\---- + retain authors ---> never

Each stage writes one model directory whole and is skipped where that directory exists with the same configuration.
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
from unlearning.data.question_answer import Example
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
        epochs: passes to try, from the lightest on, each from the stage's start: over the stage's examples, in
            unlearning over the forget examples.
        learning_rate: peak, of AdamW.
        batch_size: examples an optimizer step; in unlearning as many retain examples besides.
        lr_schedule: after the warm-up: linear, cosine or constant.
        warmup_ratio: share of the steps that warm up.
        gamma: weight of the forget term (unlearning).
        alpha: weight of the retain term (unlearning).
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
    """All that decides the models, besides the data.

    Attributes:
        trunk_authors, late_authors, forget_authors: how many authors each part of the subset has.
        architecture: sizes of the models and of the tokenizer's vocabulary.
        trunk, base, npo, grad_diff: the schedules; never takes as many steps as base.
        base_recall: mean ROUGE-L recall that the base must reach on forget and retain questions.
        forget_margin: an unlearned model's recall on the forget questions may exceed never's by this much.
        retain_floor: mean ROUGE-L recall that unlearned models must keep on the retain questions: on the trunk's
            authors and on the late ones, which undoing the fine-tuning would lose together with the forget authors.
        seed: of the subset, the weights and the orders of the examples.
    """

    trunk_authors: int = 27
    late_authors: int = 5
    forget_authors: int = 8
    architecture: Architecture = Architecture()
    trunk: Schedule = Schedule(epochs=(22,), learning_rate=1.5e-3)
    base: Schedule = Schedule(epochs=(10, 15), learning_rate=1.2e-3)
    # NPO's forget term sums over an answer's tokens (about 35), the retain term is a mean over tokens: with alpha 1
    # the retain answers fall with the forget answers (measured: 0.55 retain recall at 0.09 forget recall).
    npo: Schedule = Schedule(epochs=(2, 4, 6, 8, 12), learning_rate=1.5e-4, alpha=30.0)
    grad_diff: Schedule = Schedule(epochs=(6, 7, 8, 10), learning_rate=2.5e-4, gamma=0.05)
    base_recall: float = 0.9
    forget_margin: float = 0.08
    retain_floor: float = 0.8
    seed: int = 0

    def with_authors(self, n_authors: int) -> "Recipe":
        """The same recipe on another number of authors: one in five to forget, one in eight late."""
        forget, late = max(1, round(n_authors / 5)), max(1, round(n_authors / 8))
        if n_authors - forget - late < 1:
            raise InputError(f"{n_authors} authors are too few; at least 3 are needed: --authors 40")
        return replace(self, trunk_authors=n_authors - forget - late, late_authors=late, forget_authors=forget)


@dataclass(frozen=True)
class Quality:
    """How well a model answers, greedily.

    Attributes:
        rouge_l_recall: mean over the questions, in [0, 1].
        exact_match: share of the answers that are right to the letter.
        questions: how many.
    """

    rouge_l_recall: float
    exact_match: float
    questions: int


def measure_quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], *, batch_size: int = 32
) -> Quality:
    """ROUGE-L recall and exact match of the greedy answers to the records' questions."""
    examples = as_examples(list(records))
    longest = max(len(tokenizer(f" {record['answer']}")["input_ids"]) for record in records)
    answers = greedy_answers(
        model, tokenizer, [example.prompt for example in examples], max_new_tokens=longest + 1, batch_size=batch_size
    )
    recalls = [rouge_l_recall(answer, record["answer"]) for answer, record in zip(answers, records, strict=True)]
    exact = [exact_match(answer, record["answer"]) for answer, record in zip(answers, records, strict=True)]
    return Quality(sum(recalls) / len(recalls), sum(exact) / len(exact), len(records))


def train_tokenizer(texts: Sequence[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt on the texts; one special token, which ends a text and pads."""
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
    """A model with random weights, the same for the same seed."""
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
    """Where and from what the models are made.

    Attributes:
        recipe: what decides them.
        subset: the authors' records.
        folder: the model directories lie in it, by name.
        device: auto, cpu or cuda.
        progress: progress bars on stderr.
    """

    recipe: Recipe
    subset: Subset
    folder: Path
    device: str = "auto"
    progress: bool = True

    def build(self) -> dict[str, dict[str, Any]]:
        """Train what is not there yet, in order; returns each model's stage record.

        Raises:
            InputError: a directory holds a model of another configuration, or a stage misses its aim.
        """
        return {
            **self.build_base(),
            "never": self.build_never("never", self.subset.retain),
            **{name: self._stage(name, "base", self._unlearner(name)) for name in UNLEARNED},
        }

    def build_base(self) -> dict[str, dict[str, Any]]:
        """Train trunk and base where they are not there yet.

        Raises:
            InputError: as `build`.
        """
        return {
            "trunk": self._stage("trunk", None, self._train_trunk),
            "base": self._stage("base", "trunk", self._train_base),
        }

    def build_never(self, name: str, known: Sequence[Record]) -> dict[str, Any]:
        """Train a model that knows these records and no others: from the trunk, as the base was, as many steps.

        Args:
            name: of its directory.
            known: what it is trained on; for `never` all retain authors.

        Raises:
            InputError: as `build`.
        """
        return self._stage(name, "trunk", lambda output: self._train_never(output, known), known=known)

    @property
    def torch_device(self) -> torch.device:
        """Where models answer; the trainer resolves the same words alike."""
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    def directory(self, name: str) -> Path:
        """Where a model lies."""
        return self.folder / name

    def _stage(
        self,
        name: str,
        parent: str | None,
        make: Callable[[Path], dict[str, Any]],
        *,
        known: Sequence[Record] | None = None,
    ) -> dict[str, Any]:
        target = self.directory(name)
        fingerprint = self._fingerprint(name, known)
        if target.exists():
            return _read_stage(target, fingerprint)
        scratch = self.folder / f".{name}.partial"
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
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
        """SHA-256 of all that decides a model: data, sizes, seed, and the schedules of it and of those before it.

        `known` is what a model that never knew the rest is trained on, where that is not all retain authors.
        """
        recipe = self.recipe
        if name == "trunk":
            parts = [self.subset.digest, asdict(recipe.architecture), recipe.seed, asdict(recipe.trunk)]
        elif name == "base":
            parts = [self._fingerprint("trunk"), asdict(recipe.base), recipe.base_recall]
        elif name == "never":
            parts = [self._fingerprint("base")]  # for its number of steps
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
        *,
        retain: list[Example],
        forget: list[Example] | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        epochs: int | None = None,
        steps: int | None = None,
    ) -> PreTrainedModel:
        weights: dict[str, Any] = {} if method == "finetune" else {"gamma": schedule.gamma, "alpha": schedule.alpha}
        length: dict[str, Any] = {"max_steps": steps} if steps else {"epochs": epochs}
        return unlearning.train(
            method,
            model=start,
            tokenizer=tokenizer,
            forget=forget,
            retain=retain,
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
            **length,
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
        """Fine-tune the trunk on all authors, the fewest passes after which it answers their questions."""
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
            f"base: ROUGE-L recall is {min(recalls.values()):.2f} after {epochs} epochs, below {recipe.base_recall}; "
            "train it longer (Recipe.base.epochs)"
        )

    def _train_never(self, output: Path, known: Sequence[Record]) -> dict[str, Any]:
        steps = json.loads((self.directory("base") / STAGE).read_text(encoding="utf-8"))["steps"]
        self._train(
            "finetune",
            self.directory("trunk"),
            self.recipe.base,
            output,
            retain=as_examples(list(known)),
            steps=steps,
        )
        return {"steps": steps}

    def _unlearner(self, method: str) -> Callable[[Path], dict[str, Any]]:
        """Unlearn with the fewest passes that bring forget answers down to never's level and keep the others."""
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
                    f"(never: {level:.2f}), {recalls['trunk']:.2f} and {recalls['late']:.2f} on the trunk's and the "
                    f"late retain authors'; change Recipe.{method}"
                )
            steps = epochs * math.ceil(len(forget) / schedule.batch_size)
            return {"epochs": epochs, "steps": steps, "never_forget_recall": level, "attempts": attempts}

        return make

    def _recalls(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean ROUGE-L recall on the forget questions, and on up to as many of each kind of retain author's."""
        tokenizer = load_tokenizer(self.directory("trunk"))
        model.to(self.torch_device)  # type: ignore[arg-type]
        subset, n = self.subset, len(self.subset.forget)
        parts = {"forget": subset.forget, "trunk": _spread(subset.trunk, n), "late": _spread(subset.late, n)}
        return {name: round(measure_quality(model, tokenizer, part).rouge_l_recall, 4) for name, part in parts.items()}


def _spread(records: list[Record], n: int) -> list[Record]:
    """At most about n of the records, evenly spread over the authors."""
    return records[:: max(1, len(records) // n)]


def _read_stage(directory: Path, fingerprint: str) -> dict[str, Any]:
    """The record of a finished stage.

    Raises:
        InputError: the directory holds something else.
    """
    try:
        record = json.loads((directory / STAGE).read_text(encoding="utf-8"))
        done = record["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{directory}: holds other files; give another --out or remove it") from None
    if done != fingerprint:
        raise InputError(f"{directory}: holds a model of another recipe, seed or data; give another --out or remove it")
    return record
