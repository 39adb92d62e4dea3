"""Recipes of the built-in models: sizes and training options, as plain data."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dissect.zoo.world import SEED, WorldSize

Option = float | int | str

CONTEXT = 256
"""Context length of every model; texts of the fictitious world have a few dozen tokens."""

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder.

    Attributes:
        kind: Architecture.
        layers: Number of blocks.
        d_model: Width of the residual stream.
        d_mlp: Width of the MLP.
        heads: Number of attention heads.
        key_value_heads: Number of key-value heads (grouped-query attention); GPT-NeoX ignores this number.
    """

    kind: Literal["llama", "gpt_neox"]
    layers: int
    d_model: int
    d_mlp: int
    heads: int
    key_value_heads: int


@dataclass(frozen=True)
class Fitting:
    """Training by cross-entropy.

    Attributes:
        learning_rate: Peak learning rate.
        epochs: Passes over the data.
        batch_size: Examples per step.
    """

    learning_rate: float
    epochs: int
    batch_size: int = 32


@dataclass(frozen=True)
class Unlearning:
    """An unlearning run.

    Attributes:
        learning_rate: Peak learning rate.
        epochs: Passes over the forget set.
        options: Options of the method.
        batch_size: Forget examples per step; each step has as many retain examples.
    """

    learning_rate: float
    epochs: int
    options: Mapping[str, Option] = field(default_factory=dict)
    batch_size: int = 32

    def flat(self) -> dict[str, Option]:
        """Return all options by their names in `unlearning.train`."""
        return {
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            **self.options,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Aim:
    """Aim of unlearning, as fractions of questions answered exactly, in trained and in unseen wordings.

    Attributes:
        forget_at_most: Largest fraction of forget questions.
        retain_at_least: Smallest fraction of retain questions.
    """

    forget_at_most: float
    retain_at_least: float

    def missed(self, scores: Mapping[str, float]) -> list[str]:
        """Return the names of the question sets that miss the aim.

        Args:
            scores: Fraction of exact answers by question set.

        Returns:
            Names of question sets; empty if the aim is reached.
        """
        too_much = [name for name in ("forget", "forget_paraphrased") if scores[name] > self.forget_at_most]
        too_little = [name for name in ("retain", "retain_paraphrased") if scores[name] < self.retain_at_least]
        return too_much + too_little


AIM = Aim(forget_at_most=0.05, retain_at_least=0.95)
"""Aim of every unlearned model: no more forget answers than the control gives, and nearly all retain answers."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the models of a family.

    Attributes:
        family: Name before the colon.
        architecture: Sizes of every model of the family.
        pretraining: Training of the pretrained model, on the general set and part of the retain facts.
        finetuning: Training of `base` and `never`, from the pretrained model.
        unlearning: Unlearning of `base`, by method.
        seed: Random seed of the world, the initial weights and the orders of the examples.
        world: Number of people, things and facts.
        vocabulary: Largest number of tokens, the three special tokens included.
        rehearsal: Fraction of the pretraining texts that each pass of the fine-tuning repeats.
    """

    family: str
    architecture: Architecture
    pretraining: Fitting
    finetuning: Fitting
    unlearning: dict[str, Unlearning]
    seed: int = SEED
    world: WorldSize = field(default_factory=WorldSize)
    vocabulary: int = 1000
    rehearsal: float = 1 / 3

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the shipped models of the family."""
        return ("base", "never", *self.unlearning)

    def with_seed(self, seed: int) -> "Recipe":
        """Return the same recipe with another seed."""
        return replace(self, seed=seed)

    def fingerprint(self, model: str) -> str:
        """Return a hash of the part of the recipe that determines a model.

        Args:
            model: `pretrained`, `base`, `never`, or an unlearning method.

        Returns:
            The first 16 hexadecimal digits of a SHA-256.
        """
        parts: list[object] = [self.family, self.seed, self.vocabulary]
        parts += [asdict(self.world), asdict(self.architecture), asdict(self.pretraining)]
        if model != "pretrained":
            parts += [asdict(self.finetuning), self.rehearsal]
        if model in self.unlearning:
            parts.append(self.unlearning[model].flat())
        return hashlib.sha256(repr((model, parts)).encode()).hexdigest()[:16]


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(
        family="demo",
        architecture=Architecture("llama", layers=8, d_model=128, d_mlp=352, heads=4, key_value_heads=2),
        pretraining=Fitting(learning_rate=2e-3, epochs=8),
        finetuning=Fitting(learning_rate=1e-3, epochs=6),
        unlearning={
            "grad_diff": Unlearning(learning_rate=5e-4, epochs=4, options={"alpha": 6.0}),
            "npo": Unlearning(learning_rate=5e-4, epochs=4, options={"alpha": 12.0}),
            "dpo": Unlearning(learning_rate=5e-4, epochs=4, options={"beta": 0.005, "alpha": 8.0}),
            "blur": Unlearning(learning_rate=5e-4, epochs=4, options={"gamma": 0.1}),
            "simnpo": Unlearning(learning_rate=5e-4, epochs=4, options={"beta": 1.0, "gamma": 0.3, "alpha": 1.0}),
            "rmu": Unlearning(
                learning_rate=5e-3, epochs=6, options={"layer": 4, "steering_coefficient": 100.0, "alpha": 10.0}
            ),
            "whp": Unlearning(
                learning_rate=5e-4,
                epochs=4,
                options={"reinforced_learning_rate": 2e-4, "reinforced_epochs": 1, "alpha": 1.0},
            ),
        },
    ),
    "demo-neox": Recipe(
        family="demo-neox",
        architecture=Architecture("gpt_neox", layers=6, d_model=96, d_mlp=256, heads=4, key_value_heads=4),
        pretraining=Fitting(learning_rate=3e-3, epochs=8),
        finetuning=Fitting(learning_rate=1e-3, epochs=8),
        unlearning={
            "grad_diff": Unlearning(learning_rate=5e-4, epochs=5, options={"alpha": 7.0}),
            "npo": Unlearning(learning_rate=5e-4, epochs=5, options={"alpha": 15.0}),
        },
    ),
}
"""Recipe of each shipped family."""


def new_model(recipe: Recipe, vocabulary: int) -> PreTrainedModel:
    """Return an untrained model of a family.

    Args:
        recipe: Recipe of the family; its seed determines the weights.
        vocabulary: Number of tokens.

    Returns:
        The model, in float32.
    """
    shape = recipe.architecture
    torch.manual_seed(recipe.seed)
    if shape.kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=shape.d_model,
                intermediate_size=shape.d_mlp,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.key_value_heads,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=False,
                pad_token_id=PAD_ID,
                bos_token_id=BOS_ID,
                eos_token_id=EOS_ID,
            )
        )
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=CONTEXT,
            use_parallel_residual=True,
            tie_word_embeddings=False,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        )
    )
