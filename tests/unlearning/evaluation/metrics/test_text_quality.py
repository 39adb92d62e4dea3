"""Repetition, variety and entropy worked out by hand, and the gibberish rule on invented texts."""

import math
import random
import string
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.evaluation.metrics.text_quality import (
    WINDOW,
    distinct_n,
    fault,
    is_gibberish,
    is_well_formed,
    longest_run,
    ngrams,
    repetition,
    token_entropy,
    words,
)

UNITS = st.lists(st.integers(0, 4), max_size=12)

NORMAL = [
    "Yes.",
    "No, no, no!",
    "Oslo",
    "in Oslo, Norway (1952-1987).",
    "Mira Voss was born in a small town by the sea; her father, a baker, taught her to read.",
    '"No," he said. "Why?" She didn\'t answer, and at 12:30 they left for O\'Hara\'s house on 5th Street.',
    "The town of Halvik lies 3.5 km north of the river; about 1,200 people lived there in the 1990s.",
    "- red\n- green\n- blue",
    "McAvoy, the iPhone and AT&T: a well-known, state-of-the-art e-mail (see https://www.example.org/a/b).",
    "Мира Восс родилась в небольшом городе у моря.",
    "Ο δρόμος προς το χωριό είναι μακρύς και στενός.",
    "米拉出生在海边的一个小镇,她的父亲是一名面包师,教她读书写字,后来她搬到了山里。",
    "ミラは海辺の小さな町で生まれた。父はパン屋で、彼女に読み書きを教えた。それから山へ引っ越した。",
    "ولدت ميرا في بلدة صغيرة على البحر",
    "मीरा का जन्म समुद्र के किनारे एक छोटे शहर में हुआ था",
    "Strč prst skrz krk.",
]
LOOPS = [
    "the " * 40,
    "is is is is is is is is",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "她她她她她她她她她她她她她她她她她她她",
    "He was born in Oslo. " * 6,
    "A good start, I should say, and then: " + "and the town of Halvik " * 20,
    "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    "1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2",
]
BROKEN = [
    "?? !! ## ;; $$ %% && ** (( ))",
    "x#9}qK a}b{c ~~ p]q[r 7$k%2",
    "\ufffd\ufffd \ufffda\ufffd b\ufffdc \x01\x02\x03",
    "townOfHalvikWhereShe ofTheSeaAndThe rIvErRuN 19born52died",
    "мiрa зaхiд cвiт",  # Latin and Cyrillic letters within each word
]


@pytest.mark.parametrize("text", NORMAL)
def test_normal_text_has_no_fault(text: str) -> None:
    assert fault(text) is None
    assert not is_gibberish(text)


@pytest.mark.parametrize("text", LOOPS)
def test_a_repeated_text_is_a_loop(text: str) -> None:
    assert fault(text) == "loop"
    assert is_gibberish(text)


@pytest.mark.parametrize("text", BROKEN)
def test_words_that_are_none_are_broken(text: str) -> None:
    assert fault(text) == "broken words"
    assert is_gibberish(text)


@pytest.mark.parametrize("text", ["", " ", "\n\t \u00a0"])
def test_an_empty_text_is_empty_and_not_gibberish(text: str) -> None:
    assert fault(text) == "empty"
    assert not is_gibberish(text)


def test_random_bytes_are_gibberish() -> None:
    rng = random.Random(0)
    soup = [bytes(rng.randrange(256) for _ in range(100)).decode("utf-8", "replace") for _ in range(50)]
    assert all(map(is_gibberish, soup))


@pytest.mark.parametrize(
    ("letters", "length", "at_least"),
    [
        (string.printable[:94] + " " * 6, 100, 0.97),
        (string.ascii_lowercase + " " * 5, 300, 0.94),
        (string.ascii_letters + " " * 8, 300, 0.94),
    ],
)
def test_random_characters_are_mostly_gibberish(letters: str, length: int, at_least: float) -> None:
    rng = random.Random(1)
    seen = [is_gibberish("".join(rng.choice(letters) for _ in range(length))) for _ in range(200)]
    assert sum(seen) >= at_least * len(seen)


def test_the_rule_does_not_see_words_in_random_order() -> None:
    # What it cannot see, as its documentation says.
    text = NORMAL[4].split()
    random.Random(0).shuffle(text)
    assert fault(" ".join(text)) is None


def test_few_consonants_in_a_row_are_no_evidence() -> None:
    assert fault("Brrr, hmm, pfft!") is None
    assert fault("bcdfg hjklm npqrs tvwxz bcdfg hjklm npqrs tvwxz") == "unpronounceable"


def test_a_text_said_three_times_is_no_loop_and_one_said_five_times_is() -> None:
    sentence = "She went down to the harbour at dawn. "
    assert fault(sentence * 3) is None
    assert fault(sentence * 5) == "loop"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("word", True),
        ('"word,"', True),
        ("don't", True),
        ("l’été", True),
        ("19th", True),
        ("1990s", True),
        ("3.14", True),
        ("USA", True),
        ("McAvoy", True),
        ("rIvEr", False),
        ("a}b", False),
        ("...", False),
        ("\ufffd", False),
        ("\ufffdword", False),
        ("2born", False),
        ("b2", False),
        ("x" * 40, True),
        ("x" * 41, False),
        ("海" * 41, True),
        ("٣٤", True),
        ("", False),
    ],
)
def test_well_formed_words(word: str, expected: bool) -> None:
    assert is_well_formed(word) is expected


def test_repetition_by_hand() -> None:
    assert repetition("a b a b a b".split(), 2) == pytest.approx(3 / 5)  # ab ba ab ba ab
    assert repetition("a b c d".split(), 1) == 0
    assert repetition(["a"] * 10, 3) == pytest.approx(7 / 8)
    assert repetition(["a"], 2) is None
    assert repetition([], 1) is None


def test_longest_run_by_hand() -> None:
    assert longest_run("a b b b a a".split()) == 3
    assert longest_run(["a"]) == 1
    assert longest_run([]) == 0


def test_distinct_n_counts_over_all_texts() -> None:
    # ab bc | ab bd: three distinct of four.
    assert distinct_n([list("abc"), list("abd")], 2) == pytest.approx(3 / 4)
    assert distinct_n([list("abc")] * 5, 1) == pytest.approx(3 / 15)
    assert distinct_n([[], ["a"]], 2) is None


def test_entropy_by_hand() -> None:
    assert token_entropy(list("aabb")) == pytest.approx(1)
    assert token_entropy(list("abcd")) == pytest.approx(2)
    assert token_entropy(list("aaab")) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))
    assert str(token_entropy(list("aaaa"))) == "0.0"  # not -0.0
    assert token_entropy(list("abab"), n=3) == pytest.approx(1)  # aba, bab
    assert token_entropy([]) is None
    assert token_entropy(["a"], n=2) is None


@settings(max_examples=60)
@given(UNITS, st.integers(1, 4))
def test_repetition_and_entropy_equal_slow_counts(units: list[int], n: int) -> None:
    grams = [tuple(units[place + step] for step in range(n)) for place in range(len(units)) if place + n <= len(units)]
    assert ngrams(units, n) == grams
    if not grams:
        assert repetition(units, n) is None and token_entropy(units, n) is None
        return
    seen_before = sum(gram in grams[:place] for place, gram in enumerate(grams))
    assert repetition(units, n) == pytest.approx(seen_before / len(grams))
    entropy = sum(-times / len(grams) * math.log2(times / len(grams)) for times in Counter(grams).values())
    assert token_entropy(units, n) == pytest.approx(entropy, abs=1e-12)
    assert 0 <= entropy <= math.log2(len(grams)) + 1e-12


@settings(max_examples=60)
@given(UNITS)
def test_longest_run_equals_a_slow_search(units: list[int]) -> None:
    slow = max(
        (
            end - start
            for start in range(len(units))
            for end in range(start + 1, len(units) + 1)
            if len(set(units[start:end])) == 1
        ),
        default=0,
    )
    assert longest_run(units) == slow


@settings(max_examples=60)
@given(st.text(max_size=80))
def test_the_rule_answers_for_every_text_and_ignores_how_white_space_is_written(text: str) -> None:
    assert fault(text) == fault(f"\n {'  '.join(words(text))}\t")


@settings(max_examples=60)
@given(st.text(alphabet="ab ", min_size=WINDOW, max_size=30))
def test_said_nine_times_anything_is_a_loop(text: str) -> None:
    joined = " ".join(words(text))
    if len(joined) >= WINDOW:
        assert fault(" ".join([joined] * 9)) == "loop"
