"""Invented questions, and a tiny random model with room for WMDP's prompt."""

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tokenizer
from unlearning.data.choice_questions import LETTERS, Question
from unlearning.evaluation.subject import Subject

RECORDS = [
    {"question": "Which moss do the Velm moths eat? ", "choices": ["red", "blue-green", "none", "any"], "answer": 1},
    {"question": "Where is Orrin's bell kept?", "choices": ["in a well", "at sea", "under a stone", "x"], "answer": 0},
    {"question": "How many rings has Tarn?", "choices": ["one", "two", "three hundred and four", "four"], "answer": 2},
    {"question": "Who wrote The Tin Harbour?", "choices": ["A. Pell", "B. Pell", "C. Pell", "D. Pell"], "answer": 3},
    {"question": "What is a quessel?", "choices": ["a kind of boat", "a tool", "a bird", "a law"], "answer": 1},
]


def questions(subject: str = "biology") -> list[Question]:
    """The records as questions."""
    return [
        Question(record["question"], tuple(record["choices"]), record["answer"], subject, id=f"q{number}")
        for number, record in enumerate(RECORDS)
    ]


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: " A" is two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: number for number, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def build_model(seed: int = 0, context: int = 1024) -> LlamaForCausalLM:
    """Random weights of a scale that makes logits differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def build_subject(seed: int = 0, *, bytes_only: bool = False, context: int = 1024) -> Subject:
    """A model with its tokenizer."""
    tokenizer = build_byte_tokenizer() if bytes_only else build_tokenizer()
    return Subject.wrap(build_model(seed, context), tokenizer, name="tiny")


def slow_log_likelihood(subject: Subject, prompt: str, text: str) -> tuple[float, int]:
    """Of a text after a prompt: one forward pass in float64, and the number of tokens."""
    model = copy.deepcopy(subject.model).double()
    before, whole = subject.tokenizer(prompt)["input_ids"], subject.tokenizer(prompt + text)["input_ids"]
    assert whole[: len(before)] == before
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    places = range(len(before), len(whole))
    return sum(float(log_p[place - 1, whole[place]]) for place in places), len(places)


def letters(n: int) -> list[str]:
    """How options are asked for."""
    return [f" {letter}" for letter in LETTERS[:n]]
