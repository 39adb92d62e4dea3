"""Load a base and an unlearned model, and check that they can be compared."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dissect import zoo
from dissect.models.alignment import aligned
from dissect.models.anatomy import architecture_of
from dissect.models.configurations import differing_fields, is_of_training
from dissect.models.model import DTYPES, Model, load_model, resolve_device, resolve_dtype
from dissect.models.shared_rows import cut_to, on_shared_rows
from dissect.models.tokenizers import warn_of_tokenizers
from dissect.runtime.processes import ALONE, Processes
from dissect.runtime.sizes import in_bytes
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_weights
from unlearning.checkpoints.locate import base_of, check_files, is_adapter, locate_checkpoint, weights_directory
from unlearning.checkpoints.safetensors_files import TensorFiles
from unlearning.common.errors import InputError, naming


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A base model and the same model after unlearning.

    Attributes:
        base: Model that knows; the donor of every patch.
        unlearned: The same model after unlearning; the target.

    Examples:
        >>> from dissect import load_pair
        >>> pair = load_pair("demo:base", "demo:npo", device="cpu")
        >>> pair.tokenizer is pair.base.tokenizer
        True
    """

    base: Model
    unlearned: Model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the base, which is used for both models."""
        return self.base.tokenizer

    @property
    def n_layers(self) -> int:
        """Number of blocks of each model."""
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
    align: bool = False,
    progress: bool = True,
    processes: Processes = ALONE,
) -> ModelPair:
    """Load a base and an unlearned model, and check that they can be compared.

    Args:
        base: Model that knows: a built-in name, a directory or a hub id.
        unlearned: The same model after unlearning.
        device: `cpu`, `cuda`, `cuda:1` and so on, or `auto` to distribute the layers over all GPUs. By default a GPU
            if there is one.
        dtype: `float32` (default) or `float64`; on a GPU also `bfloat16` or `float16`. A streamed model on a GPU is by
            default computed in the dtype of its files.
        trust_remote_code: Run the model code of a hub repository.
        allow_pickle: Read pickled `.bin` weights if there are no safetensors.
        stream: Leave the weights on disk, and read them layer by layer; by default only if the pair does not fit into
            memory.
        max_memory: Largest memory of the process, in bytes, which decides whether the pair fits; by default most of the
            free memory.
        align: Put the unlearned model into the base's basis, if order, signs or scales of its neurons, heads or
            channels differ (`dissect.models.alignment.aligned`).
        progress: Show a progress bar on stderr while the files of a streamed model are hashed for the first time.
        processes: Processes of the launch that load the pair too; all of them stream it, or none.

    Returns:
        The pair.

    Raises:
        InputError: A model cannot be loaded (see `load_model`), the two differ in architecture, layers, widths or
            vocabulary, or the unlearned model is an adapter of another base.

    Warns:
        UserWarning: The tokenizers differ in a token, their chat template or how they treat texts, and the base's is
            used for both; the configurations differ in a field that can change what is computed; one model has more
            embeddings than the other, and those that both have are compared; or the pair does not fit into memory and
            is streamed.

    Examples:
        >>> from dissect import load_pair
        >>> pair = load_pair("demo:base", "demo:npo", device="cpu")
        >>> pair.n_layers == pair.base.n_layers == pair.unlearned.n_layers
        True
    """
    for role, name in (("base", base), ("unlearned", unlearned)):
        with naming(role):
            locate_checkpoint(name)
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
    with naming("unlearned"):
        _check_trained_on(unlearned, base_model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    base_model, unlearned_model = on_shared_rows([base_model, unlearned_model])
    check_comparable(base_model, unlearned_model)
    return ModelPair(base=base_model, unlearned=aligned(base_model, unlearned_model) if align else unlearned_model)


def _fits(names: Sequence[str | Path], device: str | None, dtype: str | None, max_memory: int | None) -> bool:
    """Return True if models fit into memory together; warn if they do not."""
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
        f"the pair needs {in_bytes(needed)} and {in_bytes(max(0, left))} are available, so it is streamed from disk, "
        "layer by layer",
        stacklevel=3,
    )
    return False


def _check_trained_on(name: str | Path, base: Model, *, trust_remote_code: bool, allow_pickle: bool) -> None:
    """Check that an unlearned model that is an adapter was trained on the base.

    Raises:
        InputError: The adapter's base has other weights: recovery would mix them with those of unlearning.
    """
    path = locate_checkpoint(name)
    if not is_adapter(path):
        return
    trained_on = base_of(path)
    if trained_on.resolve() == locate_checkpoint(base.name).resolve():
        return
    own = load_weights(
        trained_on,
        device=base.device,
        dtype=DTYPES[base.dtype],
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    sha256 = content_hash(own, name=str(trained_on))
    if sha256 != base.sha256:
        raise InputError(
            f"{name} is an adapter of {trained_on}, whose weights are not those of {base.name} (content hashes "
            f"{sha256[:12]} and {base.sha256[:12]}); set `base` to {trained_on}"
        )


def check_comparable(base: Model, other: Model) -> None:
    """Check that activations of one model can replace those of another.

    Args:
        base: The model that the other one is compared with.
        other: The other model.

    Raises:
        InputError: The models differ in architecture, layers, widths, vocabulary, or in the name or shape of a tensor
            (the message says in which); or they are streamed and their configurations differ.

    Warns:
        UserWarning: The tokenizers differ in a token, their chat template or how they treat texts, or the
            configurations in a field that can change what is computed.
    """
    for dimension, of_base, of_other in zip(_SHAPE, _shape(base), _shape(other), strict=True):
        if of_base != of_other:
            raise InputError(
                f"{base.name} and {other.name} differ in {dimension}: {of_base} and {of_other}; both must "
                "come from the same pretrained model"
            )
    _check_same_tensors(base, other)
    differing = differing_fields(other.hf, base.hf)
    computing = [what for field, what in differing.items() if not is_of_training(field)]
    if computing and base.streamed is not None:
        raise InputError(
            f"{other.name} has {computing[0]} ({base.name}). Whether that changes what it computes is proved "
            "with the models in memory only: turn `stream` off, or make the two configurations equal"
        )
    fields = list(differing.values())
    if fields:
        more = f", and {len(fields) - 1} more fields" if len(fields) > 1 else ""
        warnings.warn(
            f"{other.name} has {fields[0]} ({base.name}){more}; what comes of it is no work of the weights",
            stacklevel=3,
        )
    warn_of_tokenizers(base, other)


def _check_same_tensors(base: Model, other: Model) -> None:
    """Check that two models have the same parameters and buffers, of the same shapes."""
    ours, theirs = ({key: tuple(t.shape) for key, t in model.hf.state_dict().items()} for model in (base, other))
    for key in [*ours, *theirs]:
        if key not in ours or key not in theirs:
            owner, without = (base, other) if key in ours else (other, base)
            raise InputError(
                f"{owner.name} has the tensor {key}, which {without.name} does not have; both must come from the same "
                "pretrained model, and have the same config.json"
            )
        if ours[key] != theirs[key]:
            raise InputError(
                f"{base.name} and {other.name} differ in the shape of {key}: {ours[key]} and {theirs[key]}; both must "
                "come from the same pretrained model"
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
    """Load and check the control model.

    Args:
        pair: Base and unlearned model; the control must have the base's architecture and vocabulary.
        control: A loaded model, a name or path, `auto` (the control of a built-in pair, if any), or `none` or None for
            no control.

    Returns:
        The control, or None if none was given or found.

    Raises:
        InputError: The control cannot be loaded, or differs from the base in architecture or vocabulary.
    """
    if control == "auto":
        control = zoo.default_control(pair.base.name)
    elif control == "none":
        control = None
    if isinstance(control, str):
        control = load_like(control, pair.base)
    if control is not None:
        control = cut_to(control, pair.base)
        check_comparable(pair.base, control)
    return control


def load_like(name: str, base: Model) -> Model:
    """Load a further model on the base's device, in its dtype, and streamed if the base is.

    Args:
        name: Built-in name, directory or hub id.
        base: Model whose settings are used.

    Returns:
        The model.
    """
    return load_model(name, device=str(base.device), dtype=base.dtype, stream=base.streamed is not None)
