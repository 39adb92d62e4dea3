"""What all tests of checkpoints share."""

from pathlib import Path

import pytest
from transformers import (
    PreTrainedTokenizerFast,
)

from tests.unlearning.checkpoints.adapters import save_base, train_adapter


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """A base with a tokenizer, and an adapter of it without one."""
    root = tmp_path_factory.mktemp("adapter")
    base = save_base(root / "base")
    tokenizer.save_pretrained(base)
    train_adapter(root / "adapter", base)
    return base, root / "adapter"
