"""A pair of models that may be compared: loaded, validated, one tokenizer, every site proven to work."""

import copy
import inspect
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dissect.models.anatomy import Anatomy, architecture_of, find_adapter, find_anatomy
from dissect.models.site_check import check_sites
from dissect.models.sites import SITES
from dissect.models.weights import WeightNames, find_weights
from dissect.runtime.processes import ALONE, Processes
from dissect.runtime.sizes import in_bytes
from unlearning.checkpoints.load import (
    check_files,
    content_hash,
    is_adapter,
    load_tokenizer,
    load_weights,
    locate_checkpoint,
    weights_directory,
)
from unlearning.checkpoints.safetensors_files import TensorFiles
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.engine.streaming import StreamedModel

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(eq=False)
class Model:
    """One loaded model and what is known of it.

    Attributes:
        name: as the user wrote it.
        hf: the Hugging Face model, in evaluation mode; never wrapped or changed.
        tokenizer: its tokenizer.
        sha256: content hash of its weights.
        missing_sites: sites that this architecture does not have, with the reason.
        streamed: where its weights are read from layer by layer; None where they are in memory.
    """

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    missing_sites: dict[str, str] = field(default_factory=dict)
    streamed: "StreamedModel | None" = None

    @classmethod
    def wrap(cls, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> "Model":
        """A model that is in memory already, checked as a loaded one is.

        Raises:
            InputError: a weight is not finite, or the architecture is not a decoder that TransformerLens knows.
        """
        hf.eval()
        model = cls(name=name, hf=hf, tokenizer=tokenizer, sha256=content_hash(hf, name=name))
        model.missing_sites = check_sites(model)
        return model

    @cached_property
    def adapter(self) -> Any:
        """TransformerLens' knowledge of the architecture.

        Raises:
            InputError: TransformerLens has no adapter for it.
        """
        return find_adapter(self.hf, name=self.name)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where its blocks and their parts are."""
        return find_anatomy(self.hf, self.adapter)

    @cached_property
    def weights(self) -> WeightNames:
        """Which of its parameters belong to which weight site."""
        return find_weights(self.hf, self.anatomy, self.adapter)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.adapter.cfg.n_layers)

    @property
    def context(self) -> int:
        """Longest sequence in tokens, or a very large number where there is no limit."""
        return int(getattr(self.hf.config.get_text_config(), "max_position_embeddings", None) or 2**31)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.hf.parameters()).device if self.streamed is None else self.streamed.device

    @property
    def dtype(self) -> str:
        """What it computes in, as `float32`."""
        return str(next(self.hf.parameters()).dtype).removeprefix("torch.")

    @cached_property
    def takes_position_ids(self) -> bool:
        """Whether the forward accepts explicit positions (ALiBi models derive them from the mask)."""
        return "position_ids" in inspect.signature(self.hf.forward).parameters

    @cached_property
    def bridge(self) -> Any:
        """TransformerLens' view of the model.

        The bridge puts its components into the module tree in place, so it gets a copy of the tree that shares
        every parameter and buffer: `hf` stays as transformers made it, and no memory is doubled but that of
        fused projections, which the bridge copies to split them (on NeoX it reads only the copy, so weights of
        `hf` must not be changed after this view was made).

        Raises:
            InputError: TransformerLens has no adapter for this architecture.
        """
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        architecture = self.adapter.cfg.architecture  # refused here where TransformerLens does not know it
        shared: dict[int, Tensor] = {id(tensor): tensor for tensor in (*self.hf.parameters(), *self.hf.buffers())}
        tree = copy.deepcopy(self.hf, memo=dict(shared))
        with warnings.catch_warnings():
            # A name that the adapter offers and this architecture lacks; `check_sites` finds out.
            warnings.filterwarnings("ignore", message="Hook alias")
            return build_bridge_from_module(tree, architecture, hf_config=tree.config)


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


def load_model(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    stream: bool = False,
    progress: bool = True,
) -> Model:
    """Load one model from a built-in name, a directory or a hub id.

    Args:
        name: `demo:base`, a checkpoint's directory, or a hub id `owner/name`.
        device: `cpu`, `cuda`, `cuda:1`..., or `auto` to spread the layers over all GPUs; by default a GPU where
            there is one.
        dtype: `float32` (default) or `float64`; on a GPU also `bfloat16` or `float16`. A streamed model is computed
            in the dtype of its files by default, on a GPU.
        trust_remote_code: run the model code that a hub repository ships.
        allow_pickle: read pickled `.bin` weights where there are no safetensors.
        stream: leave the weights on disk, and read them layer by layer when they are needed.
        progress: show a progress bar on stderr while a streamed model's files are hashed for the first time.

    Raises:
        InputError: nothing of that name, broken or incomplete files, weights that are not finite, no tokenizer,
            an architecture that TransformerLens does not know, files that cannot be streamed.
    """
    name = str(name)
    target = resolve_device(device)
    resolve_dtype(dtype, target)  # a wrong word is told of before a download
    path = locate_checkpoint(name)
    check_files(path, allow_pickle=allow_pickle)  # first, since the tokenizer's loader reads config.json too
    if stream and is_adapter(path):
        raise InputError(
            f"{name}: an adapter cannot be streamed; merge it into its base first (peft's merge_and_unload, then "
            "save_pretrained)"
        )
    numbers = resolve_dtype(dtype, target, stored=_stored_dtype(path) if stream else None)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if stream:
        return _open_streamed(path, name, tokenizer, target, numbers, trust_remote_code, progress)
    hf = load_weights(
        path,
        device="auto" if device == "auto" else target,
        dtype=numbers,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    return Model.wrap(hf, tokenizer, name=name)


def _open_streamed(
    path: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    progress: bool,
) -> Model:
    from dissect.engine.streaming import open_streamed

    streamed = open_streamed(
        path, name=name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress
    )
    model = Model(name=name, hf=streamed.hf, tokenizer=tokenizer, sha256=streamed.sha256, streamed=streamed)
    # Nothing can be run before its layers are read; the engine proves the sites when it runs the first one.
    parts = {site.name: getattr(model.anatomy, site.part) for site in SITES.values()}
    model.missing_sites = {
        name: f"its blocks have no module for it ({type(model.hf).__name__})"
        for name, part in parts.items()
        if not part
    }
    return model


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


def resolve_device(name: str | None) -> torch.device:
    """The device of that name; without one or with `auto`, a GPU where there is one.

    Raises:
        InputError: there is no such device.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or cuda:1") from None
    if device.type == "meta":
        raise InputError("--device meta: holds no numbers; use cpu, cuda or cuda:1")
    return device


def _stored_dtype(path: Path) -> str | None:
    """What a checkpoint's configuration says that its weights are."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype")


def resolve_dtype(name: str | None, device: torch.device, *, stored: str | None = None) -> torch.dtype:
    """The dtype to compute in: the named one, on a GPU that of the files where it is given, else float32.

    Raises:
        InputError: an unknown dtype, or half precision on a CPU.
    """
    if name is None:
        return DTYPES.get(stored or "", torch.float32) if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: unknown; use one of {', '.join(DTYPES)}")
    if device.type == "cpu" and DTYPES[name] in (torch.bfloat16, torch.float16):
        raise InputError(f"--dtype {name}: half precision on a CPU is slow and coarse; leave it at float32")
    return DTYPES[name]
