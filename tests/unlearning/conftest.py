import gc
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unlearning.helpers import build_tiny_llama, build_tokenizer
from tests.unlearning.methods.whp.story import byte_level_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer
from tests.unlearning.small_world import world as world  # a fixture


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> None:
    """Leave what was imported out of garbage collections: each training ends with one, which took half of its time."""
    import transformers.trainer  # noqa: F401

    import unlearning.training.train  # noqa: F401

    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama as a user has it: a directory."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "byte level": byte_level_tokenizer(trim_offsets=False),
        "byte level, trimmed": byte_level_tokenizer(trim_offsets=True),
        "sentencepiece": sentencepiece_tokenizer(),
        "metaspace": metaspace_tokenizer(),
    }
