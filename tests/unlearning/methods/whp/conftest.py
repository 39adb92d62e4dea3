import pytest
from transformers import PreTrainedTokenizerFast

from tests.unlearning.methods.whp.story import byte_level_tokenizer, metaspace_tokenizer, sentencepiece_tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "byte level": byte_level_tokenizer(trim_offsets=False),
        "byte level, trimmed": byte_level_tokenizer(trim_offsets=True),
        "sentencepiece": sentencepiece_tokenizer(),
        "metaspace": metaspace_tokenizer(),
    }
