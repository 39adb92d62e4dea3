"""A pair of models that may be compared: loaded, validated, one tokenizer, every site proven to work."""

import copy
import inspect
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dissect.models.anatomy import Anatomy, find_adapter, find_anatomy
from dissect.models.sites import SITES
from dissect.models.weights import WeightNames, find_weights
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import check_files, is_adapter, locate_checkpoint
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.models.streamed_model import StreamedModel

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
    from dissect.models.streamed_model import open_streamed

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


def check_sites(model: "Model") -> dict[str, str]:
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
