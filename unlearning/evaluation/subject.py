"""The evaluated model: weights, tokenizer, and the hash under which its results are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints.causality import check_causal
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.checkpoints.quantized import check_plain
from unlearning.common.context import context_of
from unlearning.common.errors import InputError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model in evaluation mode, with its tokenizer.

    Attributes:
        name: Name, as the user gave it.
        model: The model, with its weights.
        tokenizer: The model's tokenizer.
        sha256: Content hash of the weights.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str

    @classmethod
    def wrap(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str = "model") -> "Subject":
        """Return a model that is in memory already, in evaluation mode.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            name: Name, for tables and messages.

        Returns:
            The model, ready to be evaluated.

        Raises:
            InputError: The weights are quantized, or a weight is not finite.
        """
        check_plain(model, name=name)
        return cls(name, model.eval(), tokenizer, content_hash(model, name=name))

    @property
    def identity(self) -> dict[str, str]:
        """Everything of the model that its numbers depend on."""
        return {
            "model_sha256": self.sha256,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
        }

    @property
    def context(self) -> int | None:
        """Maximum number of tokens that the model reads; None if its configuration states none."""
        return context_of(self.model)

    def check_tokens(self, texts: Sequence[Sequence[int]]) -> None:
        """Check that the model has an embedding for every token.

        Raises:
            InputError: A token has no embedding.
        """
        size = int(self.model.config.get_text_config().vocab_size)
        largest = max((max(ids) for ids in texts if len(ids)), default=0)
        if largest >= size:
            raise InputError(
                f"{self.name}: tokens must be below the vocabulary size {size}, got {largest}. Use the tokenizer that "
                "the model was trained with."
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
        name: Name of a checkpoint or an adapter.
        device: One of cpu, cuda, cuda:1, or auto for all GPUs; None for a GPU if there is one.
        dtype: One of float32 (the default on CPU and GPU), float64, bfloat16 and float16.
        allow_pickle: Read pickled .bin weights.
        trust_remote_code: Run the code of a hub model.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: There is no such model, its files are broken, its weights are not finite, or the device or the
            dtype cannot be used on this machine; or it is no decoder: a logit depends on a later token.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if target not in ("cpu", "auto") and not (target.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(f"`device` must be on this machine, got {target!r}. Use cpu.")
    if target in ("cpu", "auto") and not torch.cuda.is_available():
        target = "cpu"
        if dtype in ("bfloat16", "float16"):
            raise InputError(f"`dtype` must be float32 or float64 on a CPU, got {dtype!r}")
    path = locate_checkpoint(name)
    model = load_weights(
        path,
        device=target,
        dtype=DTYPES[dtype or "float32"],
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    sha256 = content_hash(model, name=str(name))
    check_causal(model, str(name))
    return Subject(str(name), model, tokenizer, sha256)


@dataclass(frozen=True)
class Runtime:
    """How models are loaded and run.

    Attributes:
        device: One of cpu, cuda, cuda:1, or auto for all GPUs; None for a GPU if there is one.
        dtype: One of float32 (the default), float64, bfloat16 and float16.
        allow_pickle: Read pickled .bin weights.
        trust_remote_code: Run the code of a hub model.
        batch_size: Number of rows scored at a time; no number depends on it.
    """

    device: str | None = None
    dtype: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False
    batch_size: int = 16

    def open(self, name: str | Path) -> Subject:
        """Return a model by directory, hub id or built-in name; see `open_subject`."""
        return open_subject(
            name,
            device=self.device,
            dtype=self.dtype,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )
