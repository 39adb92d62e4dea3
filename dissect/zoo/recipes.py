"""How the built-in models are made: sizes and training options, as plain data."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dissect.zoo.world import SEED, WorldSize

Option = float | int | str

CONTEXT = 256
"""Positions of every model; the world's texts are a few dozen tokens long."""

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2


@dataclass(frozen=True)
class Architecture:
    """Widths of a decoder; `key_value_heads` is Llama's grouped-query attention and GPT-NeoX has none."""

    kind: Literal["llama", "gpt_neox"]
    layers: int
    d_model: int
    d_mlp: int
    heads: int
    key_value_heads: int


@dataclass(frozen=True)
class Fitting:
    """Fine-tuning by cross-entropy: peak learning rate, passes over the data, examples a step."""

    learning_rate: float
    epochs: int
    batch_size: int = 32


@dataclass(frozen=True)
class Unlearning:
    """An unlearning run: peak learning rate, passes over the forget set, batch size and the method's own options.

    A step has `batch_size` forget examples and as many retain examples.
    """

    learning_rate: float
    epochs: int
    options: Mapping[str, Option] = field(default_factory=dict)
    batch_size: int = 32

    def flat(self) -> dict[str, Option]:
        """All of it by the names that `unlearning.train` knows."""
        return {
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            **self.options,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Aim:
    """What an unlearned model should answer, as shares of exact answers, in trained and in unseen wordings."""

    forget_at_most: float
    retain_at_least: float

    def missed(self, scores: Mapping[str, float]) -> list[str]:
        """The question sets whose shares are not within it."""
        too_much = [name for name in ("forget", "forget_paraphrased") if scores[name] > self.forget_at_most]
        too_little = [name for name in ("retain", "retain_paraphrased") if scores[name] < self.retain_at_least]
        return too_much + too_little


AIM = Aim(forget_at_most=0.05, retain_at_least=0.95)
"""Of every unlearned model: as little as a model that never knew, and nearly all that is to stay."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a family of models.

    Attributes:
        family: the name before the colon.
        seed: of the world, the first weights and the orders of the examples.
        world: how much there is to learn.
        vocabulary: tokens at most, the three special ones included.
        architecture: of every model of the family.
        trunk: pretraining on the general set and the trunk people's facts.
        finetuning: of base and never, from the trunk.
        rehearsal: share of what the trunk knows that each pass of the fine-tuning repeats.
        unlearning: by method, from base.
    """

    family: str
    architecture: Architecture
    trunk: Fitting
    finetuning: Fitting
    unlearning: dict[str, Unlearning]
    seed: int = SEED
    world: WorldSize = field(default_factory=WorldSize)
    vocabulary: int = 1000
    rehearsal: float = 1 / 3

    @property
    def models(self) -> tuple[str, ...]:
        """The shipped models of the family."""
        return ("base", "never", *self.unlearning)

    def with_seed(self, seed: int) -> "Recipe":
        """The same recipe from another seed."""
        return replace(self, seed=seed)

    def fingerprint(self, model: str) -> str:
        """Hash of the part of the recipe that decides a model: another recipe's is not mistaken for this one's.

        Args:
            model: trunk, base, never, or an unlearning method.
        """
        parts: list[object] = [self.family, self.seed, self.vocabulary]
        parts += [asdict(self.world), asdict(self.architecture), asdict(self.trunk)]
        if model != "trunk":
            parts += [asdict(self.finetuning), self.rehearsal]
        if model in self.unlearning:
            parts.append(self.unlearning[model].flat())
        return hashlib.sha256(repr((model, parts)).encode()).hexdigest()[:16]


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(
        family="demo",
        architecture=Architecture("llama", layers=8, d_model=128, d_mlp=352, heads=4, key_value_heads=2),
        trunk=Fitting(learning_rate=2e-3, epochs=8),
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
        trunk=Fitting(learning_rate=3e-3, epochs=8),
        finetuning=Fitting(learning_rate=1e-3, epochs=8),
        unlearning={
            "grad_diff": Unlearning(learning_rate=5e-4, epochs=5, options={"alpha": 7.0}),
            "npo": Unlearning(learning_rate=5e-4, epochs=5, options={"alpha": 15.0}),
        },
    ),
}
"""The shipped families."""


def new_model(recipe: Recipe, vocabulary: int) -> PreTrainedModel:
    """The family's model over `vocabulary` tokens, with fresh weights from the recipe's seed."""
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
