import subprocess
import sys

import pytest

from dissect.zoo import BUILTIN, default_control, default_prompts, pairs, question_set, resolve
from unlearning.common.errors import InputError


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_name_resolves_to_a_model_directory(name):
    path = resolve(name)
    assert (path / "config.json").is_file()
    assert (path / "model.safetensors").is_file()
    assert (path / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", ["demo:nop", "demo:", "demo-gpt:base", "base", ""])
def test_an_unknown_name_is_refused_in_one_line_that_lists_the_known_ones(name):
    with pytest.raises(InputError) as refused:
        resolve(name)
    assert "demo:npo" in str(refused.value) and "\n" not in str(refused.value)


def test_a_near_miss_is_named():
    with pytest.raises(InputError, match="demo:nop.*demo:npo"):
        resolve("demo:nop")


def test_pairs_name_models_that_exist():
    assert pairs()
    for pair in pairs():
        assert resolve(pair.base) != resolve(pair.unlearned) != resolve(pair.control)
        assert pair.data.is_file()


def test_defaults_of_a_family():
    assert default_prompts("demo-neox").name == "forget.jsonl"
    assert default_control("demo-neox:npo") == "demo-neox:never"
    assert default_control("/some/directory") is None
    with pytest.raises(InputError, match="family.*other"):
        default_prompts("other")
    with pytest.raises(InputError, match="forget_paraphrased"):
        question_set("other")


def test_names_are_known_without_loading_torch():
    code = "import sys, dissect.zoo; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
