"""Load one model, and check that every site of it works."""

import copy
import inspect
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dissect.models.anatomy import Anatomy, block_of, component_path, find_adapter, find_anatomy
from dissect.models.hooks import Act, hooked, module_of
from dissect.models.sites import SITES, Site
from dissect.models.weights import WeightNames, find_weights
from unlearning.checkpoints.causality import check_causal
from unlearning.checkpoints.experts import fit_experts
from unlearning.checkpoints.fit import check_fit
from unlearning.checkpoints.hashing import content_hash
from unlearning.checkpoints.load import load_config, load_tokenizer, load_weights
from unlearning.checkpoints.locate import (
    check_files,
    is_adapter,
    locate_checkpoint,
    quantization,
    read_json,
    resolved_name,
    stored_headers,
    weights_directory,
)
from unlearning.checkpoints.quantized import check_plain
from unlearning.checkpoints.repeatable import check_repeatable
from unlearning.common.context import context_of
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
    """One loaded model.

    Attributes:
        name: Name or path that the user gave.
        hf: Hugging Face model in evaluation mode; never wrapped or changed.
        tokenizer: Tokenizer of the model.
        sha256: Content hash of the weights.
        missing_sites: Sites that this architecture does not have, each with the reason.
        streamed: Source of the weights if they are read layer by layer; None if they are in memory.
    """

    name: str
    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sha256: str
    missing_sites: dict[str, str] = field(default_factory=dict)
    streamed: "StreamedModel | None" = None

    @classmethod
    def wrap(cls, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> "Model":
        """Wrap a model that is already in memory, with the checks of `load_model`.

        Args:
            hf: Causal language model of transformers; it is set to evaluation mode.
            tokenizer: Tokenizer of the model.
            name: Name for results and messages.

        Returns:
            The model.

        Raises:
            InputError: The tokenizer splits texts at random, the weights are quantized, a weight or a logit is not
                finite, TransformerLens does not support the architecture, its blocks have other states than [batch,
                position, width], or a logit depends on a later token.

        Examples:
            >>> from dissect import Model, load_model
            >>> loaded = load_model("demo:base", device="cpu")
            >>> model = Model.wrap(loaded.hf, loaded.tokenizer, name="mine")
            >>> model.sha256 == loaded.sha256
            True
        """
        check_repeatable(tokenizer, name=name)
        check_plain(hf, name=name)  # the copies that check the sites would lose the scales of quantized weights
        fit_experts(hf.eval())
        model = cls(name=name, hf=hf, tokenizer=tokenizer, sha256=content_hash(hf, name=name))
        model.missing_sites = check_sites(model)
        return model

    @cached_property
    def adapter(self) -> Any:
        """TransformerLens' adapter of the architecture.

        Raises:
            InputError: TransformerLens has no adapter for the architecture.
        """
        return find_adapter(self.hf, name=self.name)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Module paths of the blocks and their parts."""
        return find_anatomy(self.hf, self.adapter)

    @cached_property
    def weights(self) -> WeightNames:
        """Parameters of the model by weight site."""
        return find_weights(self.hf, self.anatomy, self.adapter)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm between the last block and the output head; None for a model without one (OPT, post-norm)."""
        path = component_path(self.adapter.component_mapping, "ln_final")
        try:
            return None if path is None else self.hf.get_submodule(path)
        except AttributeError:
            return None

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.hf.get_submodule(self.anatomy.blocks))  # type: ignore[arg-type]

    @property
    def context(self) -> int:
        """Longest sequence in tokens; a very large number if there is no limit."""
        return context_of(self.hf) or 2**31

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        return next(self.hf.parameters()).device if self.streamed is None else self.streamed.device

    @property
    def dtype(self) -> str:
        """Dtype of the computation, such as `float32`."""
        return str(next(self.hf.parameters()).dtype).removeprefix("torch.")

    @cached_property
    def takes_position_ids(self) -> bool:
        """True if the forward accepts explicit positions; ALiBi models derive them from the mask."""
        return "position_ids" in inspect.signature(self.hf.forward).parameters

    @cached_property
    def bridge(self) -> Any:
        """TransformerLens' bridge to the model.

        The bridge puts its components into the module tree in place, so it gets a copy of the tree that shares every
        parameter and buffer. `hf` stays as transformers made it, and no memory is doubled except that of fused
        projections, which the bridge copies to split them. On NeoX the bridge reads only these copies, so weights of
        `hf` must not be changed after the bridge was made.

        Raises:
            InputError: TransformerLens has no adapter for the architecture.
        """
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        architecture = self.adapter.cfg.architecture  # raises if TransformerLens has no adapter
        shared: dict[int, Tensor] = {id(tensor): tensor for tensor in (*self.hf.parameters(), *self.hf.buffers())}
        tree = copy.deepcopy(self.hf, memo=dict(shared))
        with warnings.catch_warnings():
            # The adapter offers a hook that this architecture lacks; `check_sites` reports it.
            warnings.filterwarnings("ignore", message="Hook alias")
            bridge = build_bridge_from_module(tree, architecture, hf_config=tree.config)
        for norm in bridge.modules():
            _give_epsilon(norm)
        return bridge


def _give_epsilon(norm: Any) -> None:
    """Let a bridge's norm compute with its module's own epsilon; it would take the one of the configuration."""
    epsilon = getattr(getattr(norm, "original_component", None), "eps", None)
    if epsilon is not None and getattr(getattr(norm, "config", None), "eps", epsilon) != epsilon:
        norm.config = copy.copy(norm.config)
        norm.config.eps = epsilon


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
        name: Built-in name such as `demo:base`, directory of a checkpoint, or hub id `owner/name`; a branch, tag or
            commit is named as `owner/name@revision`.
        device: `cpu`, `cuda`, `cuda:1` and so on, or `auto` to distribute the layers over all GPUs. By default a GPU
            if there is one.
        dtype: `float32` (default) or `float64`; on a GPU also `bfloat16` or `float16`. A streamed model on a GPU is by
            default computed in the dtype of its files.
        trust_remote_code: Run the model code of a hub repository.
        allow_pickle: Read pickled `.bin` weights if there are no safetensors.
        stream: Leave the weights on disk, and read them layer by layer when they are needed.
        progress: Show a progress bar on stderr while the files of a streamed model are hashed for the first time.

    Returns:
        The model, with its tokenizer.

    Raises:
        InputError: There is no model with this name; files are broken or missing; a weight is not finite; there is no
            tokenizer; TransformerLens does not support the architecture; or the files cannot be streamed.

    Examples:
        >>> from dissect import load_model
        >>> model = load_model("demo:base", device="cpu")
        >>> model.name, model.dtype
        ('demo:base', 'float32')
        >>> model.missing_sites
        {}
    """
    name = str(name)
    target = resolve_device(device)
    resolve_dtype(dtype, target)  # a wrong name is reported before a download
    path = locate_checkpoint(name)
    name = resolved_name(name, path)
    check_files(path, allow_pickle=allow_pickle)  # first, because loading the tokenizer also reads config.json
    if stream and is_adapter(path):
        raise InputError(
            f"`stream` must be off for {name}, which is an adapter; or merge it into its base first (peft's "
            "merge_and_unload, then save_pretrained)"
        )
    _check_architecture(path, name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    computed_in = resolve_dtype(dtype, target, stored=_stored_dtype(path) if stream else None)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if stream:
        return _open_streamed(path, name, tokenizer, target, computed_in, trust_remote_code, progress)
    hf = load_weights(
        path,
        device="auto" if device == "auto" else target,
        dtype=computed_in,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    return Model.wrap(hf, tokenizer, name=name)


def _check_architecture(path: Path, name: str, *, trust_remote_code: bool, allow_pickle: bool) -> None:
    """Refuse a model whose blocks cannot be found, or whose sizes are not those of its files: no weight is read."""
    path = weights_directory(path)
    hf = check_fit(
        path,
        load_config(path, trust_remote_code=trust_remote_code),
        stored_headers(path, allow_pickle=allow_pickle),
        quantized=quantization(read_json(path), path) is not None,
        trust_remote_code=trust_remote_code,
    )
    if hf is not None:  # what reads the weights says why it cannot be built
        find_anatomy(hf, find_adapter(hf, name=name))


def _open_streamed(
    path: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    progress: bool,
) -> Model:
    from dissect.models.streamed_forward import weights_on_demand
    from dissect.models.streamed_model import open_streamed

    streamed = open_streamed(
        path, name=name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress
    )
    model = Model(name=name, hf=streamed.hf, tokenizer=tokenizer, sha256=streamed.sha256, streamed=streamed)
    # Every forward pass reads all weights, so only one is run; the engine checks the sites when it runs the layers.
    model.missing_sites = _without_module(model) | dict(model.weights.refused)
    with weights_on_demand(streamed, blocks=model.anatomy.blocks):
        check_causal(model.hf, name, device=device)
    return model


def resolve_device(name: str | None) -> torch.device:
    """Return the device with a name.

    Args:
        name: Such as `cpu` or `cuda:1`; None or `auto` for a GPU if there is one, else the CPU.

    Returns:
        The device.

    Raises:
        InputError: There is no such device, or it is `meta`.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"`device` must be an available device such as cpu or cuda:1, got {name!r}: {reason}"
        ) from None
    if device.type == "meta":
        raise InputError(
            "`device` must be an available device such as cpu or cuda:1, got 'meta', which holds no values"
        )
    return device


def _stored_dtype(path: Path) -> str | None:
    """Return the dtype that a checkpoint's configuration states; None if it states none."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config.get("dtype") or config.get("torch_dtype")


def resolve_dtype(name: str | None, device: torch.device, *, stored: str | None = None) -> torch.dtype:
    """Return the dtype to compute in.

    Args:
        name: A name of `DTYPES`; None for the default.
        device: Device of the computation.
        stored: Dtype of the checkpoint's files, which is the default on a GPU; None if float32 is the default.

    Returns:
        The dtype; float32 by default.

    Raises:
        InputError: The dtype is unknown, or half precision on a CPU.
    """
    if name is None:
        return DTYPES.get(stored or "", torch.float32) if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}")
    if device.type == "cpu" and DTYPES[name] in (torch.bfloat16, torch.float16):
        raise InputError(f"`dtype` must be float32 or float64 on a CPU, got {name!r}; half precision is slow there")
    return DTYPES[name]


_RESIDUAL = ("resid_pre", "resid_post")


def check_sites(model: "Model") -> dict[str, str]:
    """Check that every site works on a model, with a plain forward pass and two with hooks.

    Each activation must occur exactly once in every layer, with the shape [batch, position, width], and hold nothing
    but its own part's output. A model that is patched with its own activations must return the same logits bit for bit.

    Returns:
        The sites that this architecture does not have, each with the reason.

    Raises:
        InputError: Logits are not finite or depend on later tokens; the states of a block are not [batch, position,
            width]; or patching the model with its own activations changes its logits.
    """
    check_causal(model.hf, model.name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.hf.config.get_text_config().vocab_size, (2, 6), generator=generator).to(model.device)
    missing = _without_module(model)
    kept: dict[tuple[str, int], Tensor] = {}
    occurred: Counter[tuple[str, int]] = Counter()

    def keep(states: Tensor, key: tuple[str, int]) -> None:
        occurred[key] += 1
        kept[key] = states.clone()

    def given_back(_states: Tensor, key: tuple[str, int]) -> Tensor:
        return kept[key].clone()

    def places(act: Callable[..., Tensor | None]) -> list[tuple[Site, int, Act]]:
        return [
            (site, layer, partial(act, key=(site.name, layer)))
            for site in SITES.values()
            if site.name not in missing
            for layer in range(model.n_layers)
        ]

    plain = _logits(model, ids, places(keep))
    width = int(model.adapter.cfg.d_model)
    for site, layer, _ in places(keep):
        times, states = occurred[site.name, layer], kept.get((site.name, layer))
        where = f"its {site.name} of layer {layer}"
        if site.name in _RESIDUAL and states is not None and states.dim() != 3:
            raise InputError(
                f"{model.name} ({type(model.hf).__name__}) is not supported: {where} has shape {tuple(states.shape)}, "
                "expected [batch, position, width]"
            )
        if times != 1 or states is None:
            missing.setdefault(site.name, f"{where} occurred {times} times in one forward pass")
        elif states.shape[:2] != ids.shape or (site.width == "d_model" and states.shape[2:] != (width,)):
            missing.setdefault(site.name, f"{where} has shape {tuple(states.shape)}, expected (2, 6, {width})")
    missing |= {name: reason for name, reason in _shared_outputs(model, ids).items() if name not in missing}
    patched = _logits(model, ids, places(given_back))
    if not torch.equal(plain, patched):
        gap = float((plain - patched).abs().max())
        raise InputError(
            f"{model.name}: patching the model with its own activations changes its logits by {gap:.2g}, so results of "
            "patching would be wrong; use a model whose forward pass is deterministic"
        )
    return missing | dict(model.weights.refused)


def _without_module(model: "Model") -> dict[str, str]:
    """Return the activations that have no module of their own in the blocks, each with the reason."""
    block = block_of(model.hf, model.anatomy, 0)
    return {
        site.name: model.weights.refused.get(site.name)
        or f"the blocks of {type(model.hf).__name__} have no module for this site"
        for site in SITES.values()
        if module_of(block, site) is None
    }


@torch.inference_mode()
def _logits(model: "Model", ids: Tensor, places: Iterable[tuple[Site, int, Act]]) -> Tensor:
    with hooked(model.hf, model.anatomy, places, shape=tuple(ids.shape)):
        logits: Tensor = model.hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits


def _shared_outputs(model: "Model", ids: Tensor) -> dict[str, str]:
    """Return the outputs of an attention or MLP that hold something else too, such as the residual stream.

    Where a part's own projection writes zeros, all that its output can still be is a constant, such as a norm's bias.
    """
    block = block_of(model.hf, model.anatomy, 0)
    rest: dict[str, Tensor] = {}

    def keep(states: Tensor, name: str) -> None:
        rest[name] = states.flatten(0, 1).clone()

    for name, projection in (("attn_out", block.o_proj), ("mlp_out", block.down_proj)):
        module = module_of(block, SITES[name])
        if module is None or projection is None or module is projection:
            continue
        zeros = projection.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
        try:
            _logits(model, ids, [(SITES[name], 0, partial(keep, name=name))])
        finally:
            zeros.remove()
    return {
        name: f"{type(module_of(block, SITES[name])).__name__} returns more than the output of its projection"
        for name, states in rest.items()
        if not torch.allclose(states, states[:1].expand_as(states), atol=1e-6)
    }
