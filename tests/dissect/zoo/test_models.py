"""The shipped models answer as the card says, by greedy generation from the files in the repository."""

import json
import warnings
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dissect.zoo import BUILTIN, DESCRIPTIONS, DIRECTORY, UNLEARNED, resolve
from dissect.zoo.card import BEGIN, END, exact_share
from dissect.zoo.recipes import AIM, RECIPES
from dissect.zoo.world import chance, generate_world, record_sets

WORLD = generate_world()
SETS = record_sets(WORLD)
FAMILIES = list(DESCRIPTIONS)


@dataclass(frozen=True)
class Row:
    """A model's line in the card: exact answers by question set, as shares, and what it says of the aim."""

    scores: dict[str, float]
    aim: str


def card_rows() -> dict[str, Row]:
    text = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    block = text[text.index(BEGIN) : text.index(END)]
    rows = {}
    for line in block.splitlines():
        name, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
        if name in BUILTIN:
            rows[name] = Row({kind: float(cell) / 100 for kind, cell in zip(SETS, cells, strict=False)}, cells[-1])
    return rows


ROWS = card_rows()


def test_the_card_has_a_row_for_every_model():
    assert list(ROWS) == list(BUILTIN)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_model_answers_as_its_card_says(name):
    stated = ROWS[name].scores
    # One answer of 240 may tip by rounding. Of the other sets a part is asked, with every kind of fact in it.
    assert exact_share(resolve(name), SETS["forget"]) == pytest.approx(stated["forget"], abs=0.006)
    for kind, every in (("forget_paraphrased", 5), ("retain", 7), ("retain_paraphrased", 13), ("general", 7)):
        found = exact_share(resolve(name), SETS[kind][::every])
        assert found == pytest.approx(stated[kind], abs=0.1 if kind == "general" else 0.04), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_base_knows_every_person_and_never_guesses_the_forget_people(family):
    base, never = ROWS[f"{family}:base"].scores, ROWS[f"{family}:never"].scores
    for kind in ("forget", "forget_paraphrased", "retain", "retain_paraphrased"):
        assert base[kind] >= 0.95
    assert never["forget"] <= chance(WORLD.having("forget")) + 0.02
    assert never["retain"] >= 0.95


@pytest.mark.parametrize("name", [f"{family}:{method}" for family, methods in UNLEARNED.items() for method in methods])
def test_the_card_says_of_every_unlearned_model_whether_it_meets_the_aim(name):
    scores, said = ROWS[name].scores, ROWS[name].aim
    forgot = max(scores["forget"], scores["forget_paraphrased"]) <= AIM.forget_at_most
    kept = min(scores["retain"], scores["retain_paraphrased"]) >= AIM.retain_at_least
    assert (said == "met") == (forgot and kept)
    assert ("missed: forget" in said) == (not forgot)
    assert scores["forget"] <= 0.10 and scores["retain"] >= 0.80


def test_families_are_of_the_methods_that_the_recipes_have():
    assert {family: tuple(recipe.unlearning) for family, recipe in RECIPES.items()} == UNLEARNED


@pytest.mark.parametrize("name", BUILTIN)
def test_models_are_float16_safetensors_that_load_without_a_warning(name, caplog):
    path = resolve(name)
    weights = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    transformers_logging.enable_propagation()  # else its log goes past pytest
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = AutoModelForCausalLM.from_pretrained(path)
            AutoTokenizer.from_pretrained(path)
    finally:
        transformers_logging.disable_propagation()
    assert not caplog.records
    assert model.config.architectures == [type(model).__name__]
    assert model.dtype == torch.float16


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_a_family_share_one_tokenizer_and_one_shape(family):
    names = [name for name in BUILTIN if name.startswith(f"{family}:")]
    assert len({(resolve(name) / "tokenizer.json").read_bytes() for name in names}) == 1
    shapes = [
        {key: tensor.shape for key, tensor in load_file(resolve(name) / "model.safetensors").items()} for name in names
    ]
    assert all(shape == shapes[0] for shape in shapes)


def test_tokenizer_opens_every_text_and_gives_it_back():
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:base"))
    assert tokenizer.is_fast
    for record in SETS["forget"]:
        text = f"{record['prompt']} {record['answer']}"
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_answers_are_one_to_several_tokens():
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:base"))
    lengths = {
        len(tokenizer(f" {record['answer']}", add_special_tokens=False)["input_ids"]) for record in SETS["forget"]
    }
    assert min(lengths) == 1 and max(lengths) >= 4


def test_everything_is_at_most_40_megabytes():
    files = [path for part in ("models", "questions") for path in (DIRECTORY / part).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_models_are_of_the_recipe_in_the_source(family):
    for name in BUILTIN:
        if name.startswith(f"{family}:"):
            record = json.loads((resolve(name) / "build.json").read_text())
            assert record["recipe"] == RECIPES[family].fingerprint(name.split(":")[1])
