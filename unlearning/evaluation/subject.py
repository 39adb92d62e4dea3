"""The model that is evaluated: weights, tokenizer, and the hash that its numbers are kept under."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.common.errors import InputError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that answers, in evaluation mode.

    Attributes:
        name: as the user gave it.
        model: with its weights.
        tokenizer: its own.
        sha256: content hash of its weights.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str

    @classmethod
    def wrap(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "model") -> "Subject":
        """A model that is in memory already.

        Raises:
            InputError: a weight is not finite.
        """
        return cls(name, model.eval(), tokenizer, content_hash(model, name=name))

    @property
    def identity(self) -> dict[str, str]:
        """What its numbers depend on."""
        return {
            "model_sha256": self.sha256,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
        }

    @property
    def context(self) -> int | None:
        """The most tokens that the model reads; None where its configuration names no number."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def check_tokens(self, texts: Sequence[Sequence[int]]) -> None:
        """Check that the model has an embedding for every token.

        Raises:
            InputError: it has not.
        """
        size = int(self.model.config.get_text_config().vocab_size)
        largest = max((max(ids) for ids in texts if len(ids)), default=0)
        if largest >= size:
            raise InputError(
                f"{self.name}: its tokenizer gives token {largest}, and the model has a vocabulary of {size}; use the "
                "tokenizer that the model was trained with"
            )


def open_subject(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Subject:
    """Load a model by directory, hub id or built-in name.

    Args:
        name: of the checkpoint or adapter.
        device: cpu, cuda, cuda:1, or auto for all GPUs; None takes a GPU where there is one.
        dtype: float32 (default on a CPU and a GPU alike), float64, bfloat16 or float16.
        allow_pickle: read pickled .bin weights.
        trust_remote_code: run the code that a hub model brings.

    Raises:
        InputError: there is no such model, its files are broken, its weights are not finite, or the device or the
            dtype cannot be used here.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: use {', '.join(DTYPES)}")
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if target not in ("cpu", "auto") and not (target.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(f"--device {target}: not on this machine; use cpu")
    if target in ("cpu", "auto") and not torch.cuda.is_available():
        target = "cpu"
        if dtype in ("bfloat16", "float16"):
            raise InputError(f"--dtype {dtype}: a CPU computes in float32 or float64, whatever the checkpoint's dtype")
    path = locate_checkpoint(name)
    model = load_weights(
        path,
        device=target,
        dtype=DTYPES[dtype or "float32"],
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return Subject(str(name), model, tokenizer, content_hash(model, name=str(name)))
