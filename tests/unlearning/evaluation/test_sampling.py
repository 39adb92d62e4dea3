"""Sampled answers against a loop that runs the whole text anew for every token, and against the model's own odds."""

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.unlearning.evaluation.test_generation import build_gpt2, build_neox
from tests.unlearning.helpers import build_examples, build_tiny_llama
from unlearning import InputError
from unlearning.evaluation.generation import _before_stop, _drawn_by, greedy_answers, sampled_answers


def slow_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    draws: list[float],
    temperature: float,
) -> str:
    """Token by token: the first token at which the cumulative distribution passes the draw."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for draw in draws:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1] / temperature
        total, token = 0.0, 0
        for token, p in enumerate(logits.softmax(-1).tolist()):  # noqa: B007
            total += p
            if total > draw:
                break
        if token == 0:
            break
        ids = [*ids, token]
    return tokenizer.decode(ids[start:]).strip()


@pytest.mark.parametrize("build", [build_tiny_llama, build_neox, build_gpt2])
def test_batched_samples_equal_single_ones(build, tokenizer: PreTrainedTokenizerFast) -> None:  # type: ignore[no-untyped-def]
    model = build().double()
    prompts = ["Question:", *(example.prompt for example in build_examples(2)), "Who was Ada"]
    expected = [
        [
            slow_sample(model, tokenizer, prompt, np.random.default_rng((3, i, j)).random(5).tolist(), 1.5)
            for j in (0, 1)
        ]
        for i, prompt in enumerate(prompts)
    ]
    assert len({text for row in expected for text in row}) > 5
    for batch_size in (1, 3, 64):
        answers = sampled_answers(
            model, tokenizer, prompts, samples=2, temperature=1.5, seed=3, max_new_tokens=5, batch_size=batch_size
        )
        assert answers == expected


def test_samples_follow_the_models_distribution(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    n, temperature = 4000, 0.7
    (answers,) = sampled_answers(
        model, tokenizer, ["Who was"], samples=n, temperature=temperature, max_new_tokens=1, batch_size=1000
    )
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("Who was")["input_ids"]])).logits[0, -1]
    expected: Counter[str] = Counter()
    for token, p in enumerate((logits / temperature).softmax(-1).tolist()):
        expected["" if token == 0 else tokenizer.decode([token]).strip()] += p  # type: ignore[assignment]
    counts = Counter(answers)
    for text, p in expected.items():
        assert abs(counts[text] / n - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-3


def test_a_cold_sample_is_the_greedy_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama().double()
    prompts = [example.prompt for example in build_examples(3)]
    cold = sampled_answers(model, tokenizer, prompts, temperature=1e-6, max_new_tokens=6)
    assert [row[0] for row in cold] == greedy_answers(model, tokenizer, prompts, max_new_tokens=6)


def test_samples_depend_on_the_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    one, again, other = (
        sampled_answers(model, tokenizer, ["Who was"], samples=3, seed=seed, max_new_tokens=6) for seed in (0, 0, 1)
    )
    assert one == again != other
    assert len(set(one[0])) == 3


def test_samples_stop_before_a_stop_text(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build_tiny_llama()
    (whole,) = sampled_answers(model, tokenizer, ["Who was"], samples=8, max_new_tokens=12)
    stop = whole[0][len(whole[0]) // 2 :][:2]
    steps = []
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    (cut,) = sampled_answers(model, tokenizer, ["Who was"], samples=8, max_new_tokens=12, stop_texts=["never", stop])
    assert cut == [text.split(stop)[0].strip() for text in whole]
    assert cut[0] != whole[0]
    (alone,) = sampled_answers(model, tokenizer, ["Who was"], samples=1, max_new_tokens=12, stop_texts=[stop])
    handle.remove()
    assert alone == cut[:1]
    assert len(steps) < 2 * 12  # the last was not run to the end


def test_progress_counts_every_sample(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    sampled_answers(
        build_tiny_llama(),
        tokenizer,
        ["Who was", "Where"],
        samples=3,
        max_new_tokens=1,
        batch_size=4,
        advance=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 6), (6, 6)]


def test_an_empty_prompt_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="prompt 2 .*got none"):
        sampled_answers(build_tiny_llama(), tokenizer, ["Who", ""])


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    drawn = [
        int(_drawn_by(torch.tensor([[draw]], dtype=torch.float64), 1.0)(logits, 0)) for draw in (0, 0.5, 1 - 2**-53)
    ]
    assert drawn == [1, 3, 3]


def test_the_first_of_several_stop_texts_counts() -> None:
    assert _before_stop("a Q: b Question: c", ("Question:", "Q:")) == "a "
    assert _before_stop("a Question: c Q: b", ("Question:", "Q:")) == "a "
    assert _before_stop("a", ("Question:", "Q:")) is None
