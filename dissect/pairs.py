"""A pair of models that may be compared: loaded, validated, one tokenizer, every site proven to work."""

import copy
import inspect
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dissect.anatomy import Anatomy, architecture_of, find_adapter, find_anatomy
from dissect.sites import SITES
from unlearning.checkpoints import check_files, content_hash, load_tokenizer, load_weights, locate_checkpoint
from unlearning.errors import InputError

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


def check_sites(model: Model) -> dict[str, str]:
    """Prove that every site works on this model, in one plain and one self-patched forward.

    Each site must fire exactly once in every layer, with the shape [batch, position, width], and a model patched
    with its own activations must give the same logits to the bit.

    Returns:
        The sites that this architecture does not offer, with the reason.

    Raises:
        InputError: patching the model with its own activations changes its logits.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.hf.config.get_text_config().vocab_size, (2, 6), generator=generator).to(model.device)
    bridge, config = model.bridge, model.bridge.cfg
    inputs: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "return_type": "logits"}
    points = {site.hook_name(layer): site for site in SITES.values() for layer in range(model.n_layers)}
    known = bridge.hook_dict
    fired: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    kept: dict[str, Tensor] = {}

    def record(activation: Tensor, hook: Any) -> None:
        fired[hook.name] += 1
        shapes[hook.name] = tuple(activation.shape)
        kept[hook.name] = activation.clone()

    def replace(_activation: Tensor, hook: Any) -> Tensor:
        return kept[hook.name]

    present = [point for point in points if point in known]
    with torch.inference_mode():
        plain = bridge.run_with_hooks(ids, fwd_hooks=[(point, record) for point in present], **inputs)
    missing: dict[str, str] = {}
    for point, site in points.items():
        width = config.d_mlp if site.width == "d_mlp" else config.d_model
        if point not in known:
            missing.setdefault(site.name, f"its blocks have no {point}")
        elif fired[point] != 1:
            missing.setdefault(site.name, f"{point} fired {fired[point]} times in one forward")
        elif shapes[point] != (2, 6, width):
            missing.setdefault(site.name, f"{point} has shape {shapes[point]}, expected (2, 6, {width})")
    working = [point for point in present if points[point].name not in missing]
    with torch.inference_mode():
        patched = bridge.run_with_hooks(ids, fwd_hooks=[(point, replace) for point in working], **inputs)
    if not torch.equal(plain, patched):
        gap = float((plain - patched).abs().max())
        raise InputError(
            f"{model.name}: patching it with its own activations changes its logits by {gap:.2g}; "
            "its sites cannot be trusted, so nothing was computed"
        )
    return missing


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
) -> Model:
    """Load one model from a built-in name, a directory or a hub id.

    Args:
        name: `demo:base`, a checkpoint's directory, or a hub id `owner/name`.
        device: `cpu`, `cuda`, `cuda:1`...; by default a GPU where there is one.
        dtype: `float32` (default) or `float64`; on a GPU also `bfloat16` or `float16`.
        trust_remote_code: run the model code that a hub repository ships.
        allow_pickle: read pickled `.bin` weights where there are no safetensors.

    Raises:
        InputError: nothing of that name, broken or incomplete files, weights that are not finite, no tokenizer,
            an architecture that TransformerLens does not know.
    """
    name = str(name)
    target = resolve_device(device)
    numbers = resolve_dtype(dtype, target)
    path = locate_checkpoint(name)
    check_files(path, allow_pickle=allow_pickle)  # first, since the tokenizer's loader reads config.json too
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    hf = load_weights(
        path, device=target, dtype=numbers, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    return Model.wrap(hf, tokenizer, name=name)


def load_pair(
    base: str | Path,
    unlearned: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> ModelPair:
    """Load a base and an unlearned model that may be compared; arguments as in `load_model`.

    Raises:
        InputError: what `load_model` raises, or the two differ in architecture, layers, widths or vocabulary.

    Warns:
        UserWarning: the tokenizers differ in a token; the base's is used for both.
    """
    base_model, unlearned_model = (
        load_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
        for name in (base, unlearned)
    )
    check_comparable(base_model, unlearned_model)
    return ModelPair(base=base_model, unlearned=unlearned_model)


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
    """The device of that name; without one, a GPU where there is one.

    Raises:
        InputError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or cuda:1") from None
    if device.type == "meta":
        raise InputError("--device meta: holds no numbers; use cpu, cuda or cuda:1")
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in: float32 unless another is named.

    Raises:
        InputError: an unknown dtype, or half precision on a CPU.
    """
    if name is None:
        return torch.float32
    if name not in DTYPES:
        raise InputError(f"--dtype {name}: unknown; use one of {', '.join(DTYPES)}")
    if device.type == "cpu" and DTYPES[name] in (torch.bfloat16, torch.float16):
        raise InputError(f"--dtype {name}: half precision on a CPU is slow and coarse; leave it at float32")
    return DTYPES[name]
