"""A pair of models that may be compared: base and unlearned."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from dissect.models.anatomy import architecture_of
from dissect.runtime.processes import ALONE, Processes
from dissect.runtime.sizes import in_bytes
from unlearning.checkpoints.locate import check_files, locate_checkpoint, weights_directory
from unlearning.checkpoints.safetensors_files import TensorFiles
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    pass

from dissect import zoo
from dissect.models.model import Model, load_model, resolve_device, resolve_dtype


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A base model and the same model after unlearning.

    Attributes:
        base: the model that knows; the donor of every patch.
        unlearned: the model after unlearning; the target.
    """

    base: Model
    unlearned: Model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one tokenizer of both: the base's."""
        return self.base.tokenizer

    @property
    def n_layers(self) -> int:
        """Number of blocks of each."""
        return self.base.n_layers


def load_pair(
    base: str | Path,
    unlearned: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    stream: bool | None = None,
    max_memory: int | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
) -> ModelPair:
    """Load a base and an unlearned model that may be compared; arguments as in `load_model`.

    Args:
        base: the model that knows.
        unlearned: the same model after unlearning.
        device: see `load_model`.
        dtype: see `load_model`.
        trust_remote_code: see `load_model`.
        allow_pickle: see `load_model`.
        stream: leave the weights on disk and read them layer by layer; by default where they do not fit.
        max_memory: bytes that the process may hold, which tells what fits; by default most of what is free.
        progress: see `load_model`.
        processes: those that load it too; either all of them stream it or none.

    Raises:
        InputError: what `load_model` raises, or the two differ in architecture, layers, widths or vocabulary.

    Warns:
        UserWarning: the tokenizers differ in a token; the base's is used for both. The pair does not fit into memory
            and is streamed.
    """
    if stream is None:
        stream = processes.once(lambda: not allow_pickle and not _fits((base, unlearned), device, dtype, max_memory))
    base_model, unlearned_model = (
        load_model(
            name,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            stream=stream,
            progress=progress,
        )
        for name in (base, unlearned)
    )
    check_comparable(base_model, unlearned_model)
    return ModelPair(base=base_model, unlearned=unlearned_model)


def _fits(names: Sequence[str | Path], device: str | None, dtype: str | None, max_memory: int | None) -> bool:
    """Whether these models fit into memory together."""
    from dissect.runtime.memory import memory_budget

    target = resolve_device(device)
    itemsize = resolve_dtype(dtype, target).itemsize
    paths = [weights_directory(locate_checkpoint(name)) for name in names]
    for path in paths:
        check_files(path)
    needed = sum(tensor.n_values for path in paths for tensor in TensorFiles(path).tensors.values()) * itemsize
    left = memory_budget(target, max_memory).left
    if needed <= left:
        return True
    warnings.warn(
        f"the pair takes {in_bytes(needed)} and {in_bytes(max(0, left))} can be had: it is streamed from disk, layer "
        "by layer",
        stacklevel=3,
    )
    return False


def check_comparable(base: Model, other: Model) -> None:
    """Check that activations of one model can stand in the other.

    Raises:
        InputError: they differ in architecture, layers, widths or vocabulary (in what, and how).

    Warns:
        UserWarning: the tokenizers differ in a token.
    """
    for what, of_base, of_other in zip(_SHAPE, _shape(base), _shape(other), strict=True):
        if of_base != of_other:
            raise InputError(
                f"{base.name} and {other.name} differ in {what}: {of_base} and {of_other}; "
                "a pair is one model before and after unlearning"
            )
    ours, theirs = base.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if ours != theirs:
        token = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        warnings.warn(
            f"the tokenizers of {base.name} and {other.name} differ, as in the token {token!r} "
            f"({ours.get(token)} and {theirs.get(token)}); {base.name}'s is used for both",
            stacklevel=3,
        )


_SHAPE = ("architecture", "layers", "d_model", "d_mlp", "attention heads", "key-value heads", "vocabulary")


def _shape(model: Model) -> tuple[Any, ...]:
    config = model.hf.config.get_text_config()
    cfg = model.adapter.cfg
    heads = getattr(config, "num_attention_heads", None)
    return (
        architecture_of(model.hf),
        cfg.n_layers,
        cfg.d_model,
        cfg.d_mlp,
        heads,
        getattr(config, "num_key_value_heads", heads),
        config.vocab_size,
    )


def resolve_control(pair: ModelPair, control: str | Model | None) -> Model | None:
    """The never-trained control: `auto` is a built-in pair's own, None is none.

    Raises:
        InputError: it cannot be loaded or compared.
    """
    if control == "auto":
        control = zoo.default_control(pair.base.name)
    if isinstance(control, str):
        control = load_like(control, pair.base)
    if control is not None:
        check_comparable(pair.base, control)
    return control


def load_like(name: str, base: Model) -> Model:
    """A third model, loaded as the base was."""
    return load_model(name, device=str(base.device), dtype=base.dtype, stream=base.streamed is not None)
