"""What the training benchmark trains: a random Llama or a checkpoint, and data with TOFU's lengths, from seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.models import build_tokenizer
from unlearning import Example
from unlearning.checkpoints.load import load_config, load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.common.errors import InputError
from unlearning.data.order import StepSampler

EOS = 0
SEED = 0


@dataclass(frozen=True)
class TrainingShape:
    """A model, and the amount of data that one optimizer step reads.

    Attributes:
        name: Name on the command line.
        n_layers, d_model, d_mlp, n_heads, vocab: Sizes of a Llama of random weights whose embedding and head are not
            tied.
        checkpoint: Directory of a model that is trained instead; None for the random one.
        batch: Examples of a micro-batch, forget and retain each.
        accumulation: Micro-batches of an optimizer step.
    """

    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    vocab: int
    batch: int = 4
    accumulation: int = 2
    checkpoint: Path | None = None

    @property
    def step_batch_size(self) -> int:
        """Examples of an optimizer step, forget and retain each."""
        return self.batch * self.accumulation

    @property
    def description(self) -> str:
        """One line for tables."""
        kind = "Llama of random weights" if self.checkpoint is None else "a checkpoint"
        return (
            f"{self.name}: {kind}, {self.n_layers} layers, d {self.d_model}, d_mlp {self.d_mlp}, "
            f"vocabulary {self.vocab}; a step of {self.accumulation} x {self.batch} forget and as many retain examples"
        )


SHAPES = {
    shape.name: shape
    for shape in (
        TrainingShape("wide", 8, 768, 2048, 12, 32000),
        TrainingShape("deep", 16, 256, 688, 8, 8000),
        TrainingShape("tiny", 2, 32, 64, 4, 300, batch=2),
        TrainingShape("1b", 16, 2048, 8192, 32, 32000, batch=8, accumulation=4),
    )
}
"""1b has the size of Llama-3.2-1B, and is meant for a GPU."""


def find_shape(name: str) -> TrainingShape:
    """Return the shape of this name.

    Args:
        name: Name of a shape.

    Returns:
        The shape.

    Raises:
        InputError: There is no such shape.
    """
    if name not in SHAPES:
        raise InputError(f"--shape {name}: unknown; there are {', '.join(SHAPES)}")
    return SHAPES[name]


def checkpoint_shape(name: str) -> TrainingShape:
    """Return the shape of a model on disk.

    Args:
        name: Directory, hub id or built-in name of a checkpoint.

    Returns:
        Its shape.

    Raises:
        InputError: The checkpoint cannot be read.
    """
    path = locate_checkpoint(name)
    config = load_config(path).get_text_config()
    return TrainingShape(
        name=Path(name).name,
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_mlp=config.intermediate_size,
        n_heads=config.num_attention_heads,
        vocab=config.vocab_size,
        checkpoint=path,
    )


@dataclass(frozen=True)
class Row:
    """One tokenised example: the prompt's tokens, then the answer's with the end of the sequence."""

    prompt: list[int]
    answer: list[int]

    @property
    def example(self) -> Example:
        """The same as text, one word a token; the end of the sequence is not in it."""
        words = [" ".join(f"w{token}" for token in tokens) for tokens in (self.prompt, self.answer[:-1])]
        return Example(*words)


@dataclass(frozen=True)
class TrainingCase:
    """The data of a few optimizer steps, and the model that they start from.

    Attributes:
        shape: Sizes of the model and of the steps.
        steps: Optimizer steps. The forget set has one example for each row of them, the retain set twice as many.
        device: Where to train.
    """

    shape: TrainingShape
    steps: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def forget(self) -> list[Row]:
        """The forget set."""
        return _rows(self.steps * self.shape.step_batch_size, self.shape.vocab, seed=SEED + 1)

    @cached_property
    def retain(self) -> list[Row]:
        """The retain set."""
        return _rows(2 * self.steps * self.shape.step_batch_size, self.shape.vocab, seed=SEED + 2)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word."""
        return build_tokenizer(self.shape.vocab)

    def build_model(self) -> PreTrainedModel:
        """Build the model that training starts from, the same one at every call."""
        shape = self.shape
        if shape.checkpoint is not None:
            return load_weights(shape.checkpoint).to(self.device)  # type: ignore[arg-type]
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_mlp,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_heads,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return LlamaForCausalLM(config).to(self.device)  # type: ignore[arg-type]

    def step_batches(self, *, uses_forget: bool) -> Iterator[tuple[list[Row], list[Row]]]:
        """Yield the forget and the retain examples of each optimizer step, in the toolkit's order.

        Every contestant reads the same examples in the same step, so that their losses can be compared.

        Args:
            uses_forget: Yield forget examples too; else the first list is empty.

        Yields:
            Forget and retain examples of one step.
        """
        main = self.forget if uses_forget else self.retain
        lengths = [len(row.prompt) + len(row.answer) for row in main]
        sampler = StepSampler(
            lengths,
            [0] * len(self.retain) if uses_forget else [],
            seed=SEED,
            batch_size=self.shape.batch,
            step_batch_size=self.shape.step_batch_size,
        )
        for _, plan in zip(range(self.steps), sampler, strict=False):
            rows = [main[place] for place in plan.main]
            yield (rows, [self.retain[place] for place in plan.retain]) if uses_forget else ([], rows)


def _rows(n: int, vocab: int, *, seed: int) -> list[Row]:
    """Draw random tokens in lengths like those of TOFU's forget10, at about 1.3 tokens a word.

    Questions have 12.4 words on average, with a standard deviation of their logarithm of 0.29, and a template of 6
    tokens around them; answers 26.9 and 0.44.

    Returns:
        The rows, the same for the same seed.
    """
    generator = np.random.default_rng(seed)
    prompts = 6 + np.clip(generator.lognormal(np.log(15.5), 0.29, n), 5, 50).astype(int)
    answers = np.clip(generator.lognormal(np.log(32.0), 0.44, n), 5, 90).astype(int)

    def tokens(count: int) -> list[int]:
        return generator.integers(1, vocab, count).tolist()

    return [Row(tokens(prompt), [*tokens(answer), EOS]) for prompt, answer in zip(prompts, answers, strict=True)]


def mean_tokens(rows: Sequence[Row]) -> float:
    """Return the mean number of tokens of an example."""
    return sum(len(row.prompt) + len(row.answer) for row in rows) / len(rows)
