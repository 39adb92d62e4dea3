"""Greedy answers against a loop that runs the whole text anew for every token."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import InputError
from unlearning.data.chat import ChatFormat
from unlearning.evaluation.generation import answer_ends, greedy_answers, sampled_answers


def build_neox() -> PreTrainedModel:
    torch.manual_seed(1)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def build_gpt2(n_positions: int = 128) -> PreTrainedModel:
    """Learned positions: a wrong position changes the answer, or is out of range."""
    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=384,
            n_positions=n_positions,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()


def slow_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int) -> list[int]:
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < min(start + limit, model.config.max_position_embeddings):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == 0:
            break
        ids = [*ids, token]
    return ids[start:]


def slow_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, limit: int) -> str:
    return tokenizer.decode(slow_ids(model, tokenizer, prompt, limit)).strip()


@pytest.mark.parametrize("build", [build_tiny_llama, build_neox, build_gpt2])
def test_batched_answers_equal_single_ones(build, tokenizer: PreTrainedTokenizerFast) -> None:  # type: ignore[no-untyped-def]
    model = build().double()
    prompts = ["Question:", *(example.prompt for example in build_examples(3)), "Who was Ada"]
    expected = [slow_answer(model, tokenizer, prompt, limit=6) for prompt in prompts]
    assert len(set(expected)) > 2
    for batch_size in (2, 64):
        answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=batch_size)
        assert answers == expected


def test_answers_end_at_the_models_context_whatever_the_neighbours(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_gpt2(n_positions=18).double()
    prompts = ["Who", "Question: Where was Ada Brook born?\nAnswer:"]
    assert len(tokenizer(prompts[1])["input_ids"]) < 18
    expected = [slow_answer(model, tokenizer, prompt, limit=9) for prompt in prompts]
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=9) == expected
    with pytest.raises(InputError, match="prompt 2 .*18 tokens, got"):
        greedy_answers(model, tokenizer, ["Who", "-".join(["Who was born?"] * 8)])


def test_answers_stop_at_the_end_of_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    ids = slow_ids(model, tokenizer, "Who was", limit=6)
    stop = ids[2]
    model.generation_config.eos_token_id = [0, stop]
    answers = greedy_answers(model, tokenizer, ["Who was"], max_new_tokens=6)
    assert answers == [tokenizer.decode(ids[: ids.index(stop)]).strip()]


def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="prompt 1 .*got none"):
        greedy_answers(build_tiny_llama(), tokenizer, [""])


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_chats_turn_ends_an_answer(tokenizer: PreTrainedTokenizerFast, special: bool) -> None:
    """As one token, or as the text of several; also where the checkpoint's generation configuration lacks it."""
    model = build_tiny_llama()
    free = slow_ids(model, tokenizer, "Who was", limit=9)
    end = tokenizer.decode(free[4:6])
    assert end.strip() and end not in tokenizer.decode(free[:4])
    if special:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
        assert answer_ends(model, tokenizer, ChatFormat(tokenizer, "", turn_end="<|eot|>\n<|next|>")).tokens == {
            0,
            tokenizer.convert_tokens_to_ids("<|eot|>"),
        }
        return
    chat = ChatFormat(tokenizer, "", turn_end=end)
    expected = tokenizer.decode(free[:4]).strip()
    assert greedy_answers(model, tokenizer, ["Who was"], max_new_tokens=9, chat=chat) == [expected]
    assert greedy_answers(model, tokenizer, ["Who was"], max_new_tokens=9) != [expected]
    (drawn,) = sampled_answers(model, tokenizer, ["Who was"], temperature=1e-6, max_new_tokens=9, chat=chat)
    assert drawn == [expected]


@pytest.mark.parametrize("spaces", [" ", "\n "])
def test_a_closing_space_does_not_change_an_answer(tokenizer: PreTrainedTokenizerFast, spaces: str) -> None:
    model = build_tiny_llama().double()
    kept = spaces.rstrip(" ")
    expected = greedy_answers(model, tokenizer, [f"Question: Who?\nAnswer:{kept}"], max_new_tokens=6)
    assert greedy_answers(model, tokenizer, [f"Question: Who?\nAnswer:{spaces}"], max_new_tokens=6) == expected


def without_cache(kind: str) -> PreTrainedModel:
    """A model that hands out no keys and values; RWKV also pays no heed to the mask."""
    small = {"vocab_size": 384, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    wide = {**small, "hidden_size": 32, "num_hidden_layers": 2}
    fields = {
        "openai-gpt": {**small, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "mamba": {**wide, "state_size": 8},
        "rwkv": {**wide, "context_length": 128},
        "recurrent_gemma": {
            **wide,
            "num_hidden_layers": 3,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "head_dim": 8,
            "lru_width": 32,
            "attention_window_size": 64,
        },
    }[kind]
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    found: PreTrainedModel = model
    return found


@pytest.mark.parametrize("kind", ["openai-gpt", "mamba", "rwkv", "recurrent_gemma"])
def test_models_without_a_cache_answer_as_a_plain_loop_does(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = without_cache(kind)
    prompts = ["Question: Where was Ada Brook born?\nAnswer:", "Ben", "Where was Cleo Stone"]
    expected = []
    for prompt in prompts:
        ids = list(tokenizer(prompt)["input_ids"])
        start = len(ids)
        while len(ids) < start + 6:
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True).strip())
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=6) == expected
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=1) == expected
    assert any(expected)


def test_answers_without_a_cache_end_at_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    model = without_cache("openai-gpt")
    prompts = ["Where was Ada Brook born? " * 9, "Ben"]
    assert greedy_answers(model, tokenizer, prompts, max_new_tokens=150) == [
        greedy_answers(model, tokenizer, [prompt], max_new_tokens=150)[0] for prompt in prompts
    ]
