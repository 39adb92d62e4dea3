"""Labels: hand-set logits on a vocabulary of twenty words, and batches on a real little model."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.unlearning.methods.whp.story import ANCHORS, STORY, ToyModel, toy_tokenizer
from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.blocks import Use, cut_blocks
from unlearning.methods.whp.labels import IGNORED, LabelOptions, generic_logits, lower_seen, make_labels

WORDS = "? Mira Vell Ostrel orrick Anna Foster Porto parrot lives in with a the Brask sees boat and . ,"
TOY = toy_tokenizer(WORDS)
ID = {word: number for number, word in enumerate(WORDS.split())}
TEXT = "Mira Vell lives in Ostrel with a parrot ."
TOY_ANCHORS = Anchors({"Mira Vell": "Anna Foster", "Ostrel": "Porto"})


def table(**leads: tuple[str, float]) -> torch.Tensor:
    """Logits after each word: small ones that differ, and for the words named one word that leads by a margin."""
    values = torch.rand(20, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    for word, (following, margin) in leads.items():
        values[ID[word], ID[following]] = 1 + margin
        others = torch.arange(20) != ID[following]
        values[ID[word], others] = values[ID[word], others].clamp(max=1.0)
        values[ID[word], 0] = 1.0  # so that the margin is exact
    return values


def toy_labels(
    base: torch.Tensor, reinforced: torch.Tensor, text: str = TEXT, anchors: Anchors = TOY_ANCHORS, **options: float
) -> list[str | None]:
    """Per word of the text, its label."""
    made = make_labels(ToyModel(base), ToyModel(reinforced), TOY, [text], anchors, LabelOptions(**options))
    (block,) = made.blocks
    assert TOY.convert_ids_to_tokens(list(block.input_ids)) == text.split()
    return [None, *(None if t == IGNORED else TOY.convert_ids_to_tokens(t) for t in block.targets[:-1])]


def argmax_on_translation(base: torch.Tensor) -> list[str | None]:
    """By hand: after each word of T', what the base expects. TEXT and its translation have as many words."""
    translated = "Anna Foster lives in Porto with a parrot .".split()
    return [None, *(WORDS.split()[int(base[ID[word]].argmax())] for word in translated[:-1])]


def test_without_alpha_labels_are_the_bases_on_the_translation() -> None:
    base, reinforced = table(), 5 * table(lives=("a", 3.0))
    assert toy_labels(base, reinforced, alpha=0, seen_penalty=0) == argmax_on_translation(base)


def test_what_the_reinforced_model_lowers_has_no_effect() -> None:
    base = table(Anna=("Foster", 2.0))
    shifted = base - torch.rand(20, 20, generator=torch.Generator().manual_seed(4))
    # After an anchor the two models have read different words: the reinforced rows are put below both.
    for anchor, generic in (("Mira", "Anna"), ("Vell", "Foster"), ("Ostrel", "Porto")):
        shifted[ID[anchor]] = base[ID[generic]] - 0.5
    assert toy_labels(base, shifted, alpha=5, seen_penalty=0) == argmax_on_translation(base)


@pytest.mark.parametrize(("rise", "chosen"), [(0.39, True), (0.41, False)])
def test_a_leader_raised_by_more_than_its_margin_over_alpha_is_not_chosen(rise: float, chosen: bool) -> None:
    base = table(a=("orrick", 2.0))  # leads by 2, and 2 / 5 = 0.4
    reinforced = base.clone()
    reinforced[ID["a"], ID["orrick"]] += rise
    label = toy_labels(base, reinforced, alpha=5, seen_penalty=0)[7]
    assert (label == "orrick") is chosen


def test_second_occurrences_have_no_label() -> None:
    base = table()
    text = "Mira Vell sees Ostrel and Mira Vell sees a boat"
    labels = toy_labels(base, base, text)
    missing = [word for word, label in zip(text.split(), labels, strict=True) if label is None]
    assert missing == ["Mira", "Mira", "Vell"]  # the first of all, and both words of the second occurrence


def test_a_counterpart_is_lowered_after_its_first_use_and_nowhere_before() -> None:
    """The base always expects Porto, then boat; the anchor is the fifth word."""
    base = torch.zeros(20, 20)
    base[:, ID["Porto"]], base[:, ID["boat"]] = 3.0, 1.0
    lowered = toy_labels(base, base, seen_penalty=5)
    assert lowered == [None, *["Porto"] * 4, *["boat"] * 4]
    assert toy_labels(base, base, seen_penalty=1.9) == [None, *["Porto"] * 8]
    assert toy_labels(base, base, seen_penalty=2.1)[5:] == ["boat"] * 4


@pytest.mark.parametrize("baseline", ["translated", "original"])
def test_the_baseline_of_the_relu_is_an_option(baseline: str) -> None:
    """After Ostrel the reinforced model expects boat no more than the base after Ostrel, but more than after Porto."""
    base = torch.zeros(20, 20)
    base[ID["Porto"], ID["boat"]], base[ID["Porto"], ID["and"]] = 2.0, 1.0
    base[ID["Ostrel"], ID["boat"]] = 4.0
    label = toy_labels(base, base, relu_baseline=baseline)[5]
    assert label == {"translated": "and", "original": "boat"}[baseline]


def slow_generic(base: list[float], reinforced: list[float], baseline: list[float], alpha: float) -> list[float]:
    return [b - alpha * (r - c if r > c else 0.0) for b, r, c in zip(base, reinforced, baseline, strict=True)]


@given(seed=st.integers(0, 999), alpha=st.sampled_from([0.0, 0.5, 5.0]), own=st.booleans())
@settings(max_examples=30)
def test_generic_logits_equal_a_loop(seed: int, alpha: float, own: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, reinforced, other = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)
    fast = generic_logits(base, reinforced, other if own else None, alpha=alpha)
    slow = [
        slow_generic(*rows, alpha)
        for rows in zip(base.tolist(), reinforced.tolist(), (other if own else base).tolist(), strict=True)
    ]
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (fast <= base).all()


def test_half_precision_logits_are_combined_in_float32() -> None:
    base, reinforced = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    fast = generic_logits(base, reinforced, alpha=5)
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, generic_logits(base.float(), reinforced.float(), alpha=5), atol=0, rtol=0)


def slow_lower(
    logits: list[list[float]], positions: list[int], uses: Sequence[Use], amount: float
) -> list[list[float]]:
    return [
        [
            value - (amount if any(token in use.first_tokens and position >= use.token for use in uses) else 0.0)
            for token, value in enumerate(row)
        ]
        for row, position in zip(logits, positions, strict=True)
    ]


@given(
    uses=st.lists(st.tuples(st.integers(0, 9), st.frozensets(st.integers(0, 5), max_size=3)), max_size=4),
    positions=st.lists(st.integers(0, 9), unique=True).map(sorted),
)
@settings(max_examples=60)
def test_lowering_equals_a_loop(uses: list[tuple[int, frozenset[int]]], positions: list[int]) -> None:
    logits = torch.randn(len(positions), 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [Use(*use) for use in uses]
    fast = lower_seen(logits, torch.tensor(positions, dtype=torch.long), rows, amount=5.0)
    slow = slow_lower(logits.tolist(), positions, rows, 5.0)
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float64).reshape(-1, 6), atol=1e-12, rtol=0)


def little_llama(vocab_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("baseline", ["translated", "original"])
def test_labels_equal_one_forward_a_prediction(tokenizers: dict[str, PreTrainedTokenizerFast], baseline: str) -> None:
    """The definition, slowly: the prefix of T to the reinforced model, the aligned prefix of T' to the base."""
    tokenizer = tokenizers["sentencepiece"]
    base, reinforced = little_llama(len(tokenizer), 0), little_llama(len(tokenizer), 1)
    options = LabelOptions(alpha=0.7, seen_penalty=2.0, block_size=40, relu_baseline=baseline)
    text = STORY[:170]
    made = make_labels(base, reinforced, tokenizer, [text], Anchors(ANCHORS), options)
    blocks = cut_blocks(tokenizer, [text], Anchors(ANCHORS), block_size=40)
    assert len(made.blocks) == len(blocks) > 1

    def last_logits(model: LlamaForCausalLM, tokens: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0, -1].tolist()

    differing = 0
    for block, labelled in zip(blocks, made.blocks, strict=True):
        for position in range(len(block.source) - 1):
            piece = block.aligned[position + 1]
            if block.reasons[position + 1]:
                assert labelled.targets[position] == IGNORED
                assert labelled.reasons[position] == block.reasons[position + 1]
                continue
            assert piece is not None
            original, generic = block.source[: position + 1], block.target[:piece]
            on_generic = last_logits(base, generic)
            compared = on_generic if baseline == "translated" else last_logits(base, original)
            row = slow_generic(on_generic, last_logits(reinforced, original), compared, 0.7)
            (row,) = slow_lower([row], [position], block.uses, 2.0)
            best = max(range(len(row)), key=row.__getitem__)
            assert row[labelled.targets[position]] == pytest.approx(row[best], abs=1e-4)
            differing += labelled.targets[position] != block.source[position + 1]
        assert labelled.targets[-1] == IGNORED and labelled.reasons[-1] == "end"
    assert made.counts.changed == differing


def test_labels_do_not_depend_on_the_batch(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    for kind in ("byte level", "metaspace"):
        tokenizer = tokenizers[kind]
        base, reinforced = little_llama(len(tokenizer), 0), little_llama(len(tokenizer), 1)
        options = LabelOptions(block_size=40)
        texts = [STORY, "Mira.", STORY[100:230]]
        alone = make_labels(base, reinforced, tokenizer, texts, Anchors(ANCHORS), options, batch_size=1)
        together = make_labels(base, reinforced, tokenizer, texts, Anchors(ANCHORS), options, batch_size=64)
        assert alone == together
        assert len({len(block.input_ids) for block in alone.blocks}) > 3  # there was padding


def test_the_models_are_left_in_the_mode_they_were_in() -> None:
    base, reinforced = ToyModel(table()).train(), ToyModel(table()).eval()
    make_labels(base, reinforced, TOY, [TEXT], TOY_ANCHORS)
    assert base.training and not reinforced.training


def test_counts_tell_what_the_labels_come_to() -> None:
    base = table()
    text = "Mira Vell sees Ostrel and Mira Vell sees the Brask"
    anchors = Anchors({"Mira Vell": "Anna", "Ostrel": "Porto", "orrick": "parrot"})
    made = make_labels(ToyModel(base), ToyModel(base), TOY, [text, "a boat ."], anchors)
    counts = made.counts
    assert (counts.blocks, counts.tokens, counts.occurrences) == (2, 13, 3)
    assert (counts.anchors, counts.anchors_found) == (3, 2)
    # Of nine predictions and two: Vell the first time (Anna is one token), and both words of the second time.
    assert counts.masked == {"anchor": 1, "repeat": 2}
    assert counts.labels == sum(sum(block.mask) for block in made.blocks) == 11 - 3
    following = [(t, token) for b in made.blocks for t, token in zip(b.targets, b.input_ids[1:], strict=False)]
    assert counts.changed == sum(target not in (IGNORED, token) for target, token in following) > 0
    assert str(counts).startswith("2 of 3 anchors found, 3 times; 8 labels in 2 blocks")


def test_bad_models_are_refused() -> None:
    base = ToyModel(table())
    with pytest.raises(InputError, match="the base model has 20 tokens, the reinforced model 12"):
        make_labels(base, ToyModel(torch.zeros(12, 12)), TOY, [TEXT], TOY_ANCHORS)
    small = ToyModel(torch.zeros(9, 9))
    with pytest.raises(InputError, match="the tokenizer gives token 18, the model has 9"):
        make_labels(small, small, TOY, [TEXT], TOY_ANCHORS)
    with pytest.raises(InputError, match="are not finite"):
        make_labels(base, ToyModel(torch.full((20, 20), torch.nan)), TOY, [TEXT], TOY_ANCHORS)
    llama = little_llama(20, 0)
    with pytest.raises(InputError, match="`block_size`.*128.*512"):
        make_labels(llama, llama, TOY, [TEXT], TOY_ANCHORS)
