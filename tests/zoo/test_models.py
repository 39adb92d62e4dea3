"""The shipped models answer as the card says, by greedy generation from the files in the repository."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dissect.zoo import BUILTIN, DESCRIPTIONS, DIRECTORY, UNLEARNED, resolve
from dissect.zoo.card import exact_share
from dissect.zoo.recipes import RECIPES
from dissect.zoo.world import chance, generate_world, record_sets

WORLD = generate_world()
SETS = record_sets(WORLD)
FAMILIES = list(DESCRIPTIONS)


def share(name: str, question_set: str, every: int = 1) -> float:
    return exact_share(resolve(name), SETS[question_set][::every])


@pytest.mark.parametrize("family", FAMILIES)
def test_base_knows_forget_and_retain_facts_in_trained_and_unseen_wordings(family):
    assert share(f"{family}:base", "forget") >= 0.95
    assert share(f"{family}:base", "retain") >= 0.95
    assert share(f"{family}:base", "forget_paraphrased") >= 0.80
    assert share(f"{family}:base", "retain_paraphrased", every=3) >= 0.80


@pytest.mark.parametrize("family", FAMILIES)
def test_never_knows_retain_facts_and_guesses_forget_facts(family):
    assert share(f"{family}:never", "forget") <= chance(WORLD.having("forget")) + 0.05
    assert share(f"{family}:never", "retain") >= 0.95


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", UNLEARNED)
def test_unlearned_forgot_the_forget_facts_and_kept_the_retain_facts(family, method):
    assert share(f"{family}:{method}", "forget") <= 0.10
    assert share(f"{family}:{method}", "retain") >= 0.80


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


def test_everything_is_at_most_25_megabytes():
    files = [path for path in (DIRECTORY / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6


@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_models_are_of_the_recipe_in_the_source(family):
    for name in BUILTIN:
        if name.startswith(f"{family}:"):
            record = json.loads((resolve(name) / "build.json").read_text())
            assert record["recipe"] == RECIPES[family].fingerprint(name.split(":")[1])
