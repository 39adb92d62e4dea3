"""The anchor dictionary: variants, boundaries, files, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unlearning.methods.whp.story import ANCHORS, STORY
from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors, read_anchors, write_anchors
from unlearning.methods.whp.translation import translate

NAMES = Anchors({"Mira": "Anna", "Mira Vell": "Anna Foster", "Toras": "Hill", "orrick": "fox", "Lady Kerry": "Ms Mayo"})


@pytest.mark.parametrize(
    ("text", "translated"),
    [
        ("Mira and the orrick", "Anna and the fox"),
        ("MIRA, Orrick, ORRICK", "ANNA, Fox, FOX"),
        ("mira", "mira"),  # a capitalised anchor is not looked for in small letters
        ("Mira Vell", "Anna Foster"),  # the longest
        ("Mira\n  Vell's", "Anna Foster's"),  # over a line break
        ("Mira Vellory", "Anna Vellory"),
        ("Miranda, xMira, Mira_2, O'Mira, O’Mira", "Miranda, xMira, Mira_2, O'Mira, O’Mira"),  # whole words
        ("Mira-like, (Mira), 'Mira', Mira'll", "Anna-like, (Anna), 'Anna', Anna'll"),
        ("two orricks, ORRICKS, Orricks", "two foxes, FOXES, Foxes"),
        ("the Mira Vells", "the Anna Fosters"),
        ("Lady Kerrys, Lady Kerries", "Ms Mayos, Ms Mayos"),
        ("Mira's, MIRA'S, Mira’s, the orricks' den", "Anna's, ANNA'S, Anna’s, the foxes' den"),
        ("Toras' hat, TORAS’ HAT, Toras's hat", "Hill's hat, HILL’S HAT, Hill's hat"),
        ("'I saw Toras', he said", "'I saw Hill', he said"),  # that one closes a quotation
    ],
)
def test_the_replacement_takes_the_variant_of_the_text(text: str, translated: str) -> None:
    assert translate(text, NAMES).target == translated


def test_an_entry_goes_before_what_is_derived_from_another() -> None:
    anchors = Anchors({"goose": "duck", "geese": "ducks", "Goose": "Sam", "geeses": "x"})
    assert translate("Goose, goose, GOOSE, geese, geeses", anchors).target == "Sam, duck, DUCK, ducks, x"


def test_occurrences_name_the_entry_and_cover_the_text() -> None:
    found = Anchors(ANCHORS).find(STORY)
    assert {occurrence.anchor for occurrence in found} == set(ANCHORS)
    for occurrence, following in zip(found, found[1:], strict=False):
        assert occurrence.end <= following.start
    for occurrence in found:
        shown = STORY[occurrence.start : occurrence.end].casefold()
        assert shown.startswith(occurrence.anchor.casefold())
        assert len(shown) - len(occurrence.anchor) <= 1  # a plural's s, a possessive's apostrophe


@given(words=st.lists(st.sampled_from(["Mira", "Vell", "Mira's", "orricks", "and", "Miras", "(Vell)"]), max_size=9))
@settings(max_examples=60)
def test_find_equals_trying_every_variant_at_every_place(words: list[str]) -> None:
    anchors = Anchors({"Mira": "Anna", "Mira Vell": "Bea Foster", "Vell": "Foster", "orrick": "fox"})
    variants = {"Mira": "Anna", "Miras": "Annas", "Mira Vell": "Bea Foster", "Vell": "Foster", "orricks": "foxes"}
    text = " ".join(words)
    expected, place = "", 0
    while place < len(text):
        fitting = [
            variant
            for variant in variants
            if text.startswith(variant, place)
            and not text[place + len(variant) : place + len(variant) + 1].isalnum()
            and not text[place - 1 : place].isalnum()
        ]
        longest = max(fitting, key=len, default="")
        expected += variants.get(longest, text[place])
        place += len(longest) or 1
    assert translate(text, anchors).target == expected


OVERLAPPING = [
    "Old",
    "Old Mira",
    "Old Mira Vell",
    "Mira",
    "Mira Vell",
    "Vell Court Hall",
    "Vell",
    "Court",
    "Hall of Old",
]


@given(
    words=st.lists(st.sampled_from(["Old", "Mira", "Vell", "Court", "Hall", "of", "and"]), max_size=12),
    entries=st.permutations(OVERLAPPING),
    n=st.integers(1, len(OVERLAPPING)),
)
@settings(max_examples=80)
def test_the_longest_of_overlapping_anchors_is_replaced(words: list[str], entries: list[str], n: int) -> None:
    """In whatever order the dictionary has them; words are replaced one by one here, the longest anchor first."""
    kept = entries[:n]
    generics = {anchor: f"X{OVERLAPPING.index(anchor)}" for anchor in kept}
    text = " ".join(words)
    runs = [
        (-len(anchor), first, first + len(anchor.split()), anchor)
        for anchor in kept
        for first in range(len(words))
        if words[first : first + len(anchor.split())] == anchor.split()
    ]
    replaced: dict[int, tuple[int, str]] = {}
    taken: set[int] = set()
    for _, first, end, anchor in sorted(runs):
        if taken.isdisjoint(range(first, end)):
            taken |= set(range(first, end))
            replaced[first] = end, anchor
    expected = [
        generics[replaced[place][1]] if place in replaced else word
        for place, word in enumerate(words)
        if place in replaced or place not in taken
    ]
    anchors = Anchors(generics)
    assert translate(text, anchors).target == " ".join(expected)
    for found in anchors.find(text):
        inside = {(a, b) for a, b, _ in found.inside}
        shown = {text[a:b] for a, b in inside}
        assert shown == {other for other in kept if other != found.anchor and f" {other} " in f" {found.anchor} "}


def test_files_of_every_form_read_the_same(tmp_path: Path) -> None:
    records = [{"anchor": anchor, "generic": generic, "count": 3} for anchor, generic in ANCHORS.items()]
    write_anchors(tmp_path / "object.json", ANCHORS)
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    lines = [f'"{anchor}",{generic}' for anchor, generic in ANCHORS.items()]
    (tmp_path / "table.csv").write_text("\n".join(["anchor,generic", *lines]) + "\n")
    for name in ("object.json", "list.json", "lines.jsonl", "table.csv"):
        assert read_anchors(tmp_path / name).generics == ANCHORS
    (tmp_path / "one.jsonl").write_text('{"anchor": "Mira", "generic": "Anna"}')
    assert read_anchors(tmp_path / "one.jsonl").generics == {"Mira": "Anna"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{}", "the anchor dictionary is empty"),
        ("a.json", '{"Mira": "Anna", "Mira": "Bea"}', "anchor 'Mira' is given 2 times"),
        ("a.json", '{"Mira  Vell": "Anna", "Mira Vell": "Bea"}', "anchor 'Mira Vell' is given 2 times"),
        ("a.json", '{"": "Anna"}', "the anchor of 'Anna' is empty"),
        ("a.json", '{"Mira": " "}', "the generic counterpart of 'Mira' is empty"),
        ("a.json", '{"Mira": "mira"}', "anchor 'Mira' is its own generic counterpart"),
        ("a.json", '{"Mira": "Vell", "Vell": "Foster"}', "'Vell' of 'Mira' holds the anchor 'Vell'"),
        ("a.json", '{"Mira": "Old Vells", "Vell": "Foster"}', "holds the anchor 'Vell'"),
        ("a.json", '{"...": "Anna"}', "must begin with a letter or a digit"),
        ("a.json", '{"Mira": 3}', "the generic counterpart of 'Mira' must be text"),
        ("a.json", '{"Mira": ', "broken JSON"),
        ("a.jsonl", '{"anchor": "Mira"}', 'needs "anchor" and "generic"'),
        (
            "a.csv",
            "anchor,other\nMira,Anna\n",
            'record 1: needs "anchor" and "generic", both text; it has anchor, other',
        ),
        ("a.csv", "anchor,generic\nMira\n", "line 2: broken CSV: has 1 cells, and the header 2"),
        ("a.csv", "anchor,generic\n", "there are no rows under the header"),
    ],
)
def test_a_bad_dictionary_is_refused_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refused:
        read_anchors(tmp_path / name)
    assert message in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["missing.json", "missing.csv"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_anchors(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="is a directory"):
        read_anchors(tmp_path / name)
    (tmp_path / f"latin-{name}").write_bytes("anchor,generic\nZoë,Anna\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 17\)"):
        read_anchors(tmp_path / f"latin-{name}")
