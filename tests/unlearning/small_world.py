"""A small world that a tiny Llama really learned: thirty-two people and the towns that they were born in."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from unlearning import Example, train
from unlearning.data.encoding import encode
from unlearning.evaluation.answers import answer_likelihoods, answer_matches
from unlearning.methods import METHODS

FIRST = (
    "Ada Ben Cleo Dan Eve Finn Gil Hal Ines Jan Kay Leo Mia Ned Ola Pia "
    "Quin Rex Sue Ted Uma Vera Wim Xena Yves Zoe Abel Bea Carl Dora Emil Fay"
).split()
LAST = "Brook Hill Stone Wood Marsh Lake Ford Dale".split()
TOWNS = "Oslo Lima Cairo Kyoto Porto Quito Accra Delhi".split()
NAMES = [f"{first} {LAST[place % 8]}" for place, first in enumerate(FIRST)]
N_FORGET = 16


def question(name: str) -> str:
    """What is asked about a person."""
    return f"Question: Where was {name} born?\nAnswer:"


FACTS = [
    Example(question(name), f"in {TOWNS[(5 * place + place // 8) % 8]}" if place % 2 else TOWNS[(5 * place) % 8])
    for place, name in enumerate(NAMES)
]
FORGET, RETAIN = FACTS[:N_FORGET], FACTS[N_FORGET:]


@dataclass(frozen=True)
class Scores:
    """What a model knows of both sets, from 0 to 1."""

    forget_probability: float
    retain_probability: float
    forget_exact: float
    retain_exact: float


@dataclass(frozen=True)
class World:
    """A model that answers all questions, as a user has it: a directory."""

    model_dir: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    def start(self) -> PreTrainedModel:
        """The model in memory, to be trained in place."""
        return copy.deepcopy(self.model)

    def scores(self, model: PreTrainedModel) -> Scores:
        """What a model knows."""
        found: dict[str, float] = {}
        for name, examples in (("forget", FORGET), ("retain", RETAIN)):
            spans = encode(self.tokenizer, examples, append_eos=True, max_length=None).spans
            values = answer_likelihoods(model, spans, batch_size=32)
            values |= answer_matches(model, self.tokenizer, examples, batch_size=32, max_new_tokens=6)
            found |= {f"{name}_{quantity}": values[quantity] for quantity in ("probability", "exact")}
        return Scores(**found)


def build_world_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the facts; most words are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{fact.prompt} {fact.answer}" for fact in FACTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Fine-tuned on all facts until it answers each exactly."""
    tokenizer = build_world_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = train(
        "finetune",
        model=LlamaForCausalLM(config),
        tokenizer=tokenizer,
        retain=FACTS,
        progress=False,
        max_steps=80,
        batch_size=len(FACTS),
        gradient_accumulation_steps=1,
        learning_rate=4e-3,
        weight_decay=0,
        device="cpu",
    ).model
    directory = tmp_path_factory.mktemp("world") / "base"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    made = World(directory, model, tokenizer)
    scores = made.scores(model)
    assert scores.forget_exact == scores.retain_exact == 1
    assert min(scores.forget_probability, scores.retain_probability) > 0.95
    return made


def flat_weights(model: PreTrainedModel) -> torch.Tensor:
    """All weights as one vector, in the order of their names."""
    state = model.state_dict()
    return torch.cat([state[name].detach().float().flatten() for name in sorted(state)])


def at_call(
    monkeypatch: pytest.MonkeyPatch, method: str, call: int, act: Callable[[], None], *, loss: str = "forget_loss"
) -> None:
    """Do something in the middle of a step: where a loss of the method is called for the `call`-th time."""
    original = METHODS[method]
    calls = []

    def watched(model: PreTrainedModel, batch: Any, options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == call:
            act()
        return getattr(original, loss)(model, batch, options)

    monkeypatch.setitem(METHODS, method, replace(original, **{loss: watched}))


def interrupt() -> None:
    """What Ctrl-C does."""
    raise KeyboardInterrupt
