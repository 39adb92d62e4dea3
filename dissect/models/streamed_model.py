"""Open a model whose weights stay on disk: its module tree without values, and the location of each tensor."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dissect.models.fingerprints import fingerprint
from unlearning.checkpoints.experts import fit_experts
from unlearning.checkpoints.fit import check_tensors
from unlearning.checkpoints.hashing import combined_hash
from unlearning.checkpoints.keys import find_wrappers
from unlearning.checkpoints.load import load_config, missing_keys
from unlearning.checkpoints.locate import stored_headers
from unlearning.checkpoints.safetensors_files import StoredTensor, TensorFiles
from unlearning.common.errors import InputError

_INSTEAD = "turn `stream` off to load it completely"


@dataclass(frozen=True, eq=False)
class StreamedModel:
    """A causal language model whose weights are on disk.

    Attributes:
        name: Name or path that the user gave.
        hf: Hugging Face model in evaluation mode, with its buffers. Its parameters are on the meta device except
            while a `LayerReader` has loaded them.
        files: Files of the checkpoint.
        stored: For every key of the model's state dict, the name of its tensor on disk; tied parameters share one.
        hashes: `tensor_hash` of every key's values on disk.
        sha256: Content hash of the weights, equal to that of the model in memory if its dtype represents them exactly.
        device: Device that weights are loaded to.
    """

    name: str
    hf: PreTrainedModel
    files: TensorFiles
    stored: dict[str, str]
    hashes: dict[str, str]
    sha256: str
    device: torch.device
    _empty: dict[str, Tensor] = field(repr=False)

    def tensor(self, key: str) -> StoredTensor:
        """Return the location on disk of a key of the state dict."""
        return self.files.tensors[self.stored[key]]

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype that a key of the state dict is computed in."""
        return self._empty[key].dtype

    def put(self, key: str, values: Tensor) -> None:
        """Put a tensor into the module tree."""
        module, _, leaf = key.rpartition(".")
        setattr(self.hf.get_submodule(module), leaf, values)

    def unload(self, key: str) -> None:
        """Put the meta tensor back."""
        self.put(key, self._empty[key])

    def is_parameter(self, key: str) -> bool:
        """Return True if a key of the state dict is a parameter, False if it is a buffer."""
        return isinstance(self._empty[key], nn.Parameter)


def open_streamed(
    path: Path,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> StreamedModel:
    """Open a checkpoint without loading it: check that its files hold the whole model, and hash them.

    Args:
        path: Directory of the checkpoint.
        name: Name for messages.
        dtype: Dtype of the computation.
        device: Device of the computation.
        trust_remote_code: Run the model code of a hub repository.
        progress: Show a progress bar on stderr while the files are hashed for the first time.

    Returns:
        The model, with all its parameters on the meta device.

    Raises:
        InputError: A file is missing, broken or truncated; the tensors are not those of the model, or are stored in
            another layout; or a tensor has a value that is not finite.

    Warns:
        UserWarning: The files hold tensors that the model does not use.
    """
    files = TensorFiles(path)
    hf = _skeleton(path, dtype=dtype, device=torch.device(device), trust_remote_code=trust_remote_code)
    stored = _find_tensors(hf, files)
    hollow: dict[tuple[int, str], Tensor] = {}  # tied parameters stay one
    empty = {
        key: hollow.setdefault((id(tensor), stored[key]), _emptied(tensor))
        for key, tensor in hf.state_dict(keep_vars=True).items()
    }
    by_name = fingerprint(files, name=name, progress=progress)
    hashes = {key: by_name[stored[key]] for key in empty}
    sha256 = combined_hash((key, tensor.shape, hashes[key]) for key, tensor in empty.items())
    model = StreamedModel(name, hf, files, stored, hashes, sha256, torch.device(device), empty)
    for key in stored:
        model.unload(key)
    return model


def _emptied(tensor: Tensor) -> Tensor:
    hollow = tensor.detach().to("meta")
    return nn.Parameter(hollow, requires_grad=False) if isinstance(tensor, nn.Parameter) else hollow


def empty_model(path: Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of a checkpoint's configuration with its buffers, and with parameters on the meta device.

    Args:
        path: Directory of the checkpoint.
        dtype: Dtype of the parameters.
        trust_remote_code: Run the model code of a hub repository.

    Returns:
        The model.

    Raises:
        InputError: The configuration is broken (see `load_config`), or transformers cannot build the model.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    try:
        # Never in memory and then emptied, tensor by tensor: the experts of one layer of DeepSeek V3 take 30 GB.
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        _compute_buffers(hf)
        return hf
    except Exception as error:  # the configuration is a stranger's: any error may come
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"{path}: transformers cannot build it: {reason}; name a causal language model that it knows"
        ) from None


@torch.no_grad()
def _compute_buffers(hf: PreTrainedModel) -> None:
    """Give a model's buffers their values, as transformers does for those that no checkpoint holds."""
    for parameter in hf.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in hf.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if hasattr(module, "_is_hf_initialized"):
            del module._is_hf_initialized
    hf.initialize_weights()


def _skeleton(path: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model with its buffers but without its parameters."""
    hf = empty_model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    if getattr(hf.config, "quantization_config", None) is not None:
        raise InputError(f"{path}: cannot be streamed: its weights are quantized; {_INSTEAD}")
    if dtype in (torch.float16, torch.bfloat16) and (hf._keep_in_fp32_modules or hf._keep_in_fp32_modules_strict):
        raise InputError(
            f"{path}: some modules of this model must stay in float32, so it cannot be streamed in half precision; set "
            "`dtype` to float32"
        )
    for module in hf.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    fit_experts(hf)
    return hf.eval()


def _find_tensors(hf: PreTrainedModel, files: TensorFiles) -> dict[str, str]:
    """Return the name on disk of every key of the state dict, by transformers' rules for loading a checkpoint."""
    wanted = hf.state_dict()
    places = check_tensors(hf, stored_headers(files.path), files.path)
    if places.converted:
        raise InputError(
            f"{files.path}: cannot be streamed: the tensor {next(iter(places.converted))} is stored in another layout "
            f"than the model has; {_INSTEAD}"
        )
    stored = places.stored
    stored |= _tied(hf, stored)
    missing = sorted(wanted.keys() - stored.keys())
    if missing:
        raise InputError(f"{files.path}: {missing_keys(missing, places.unexpected, hf.base_model_prefix)}")
    wrappers = find_wrappers(files.tensors)
    if wrappers:
        warnings.warn(f"{files.path}: the names of its weights are read without {', '.join(wrappers)}", stacklevel=3)
    _warn_of(places.unexpected, hf, files.path)
    return {key: stored[key] for key in wanted}


def _tied(hf: PreTrainedModel, stored: dict[str, str]) -> dict[str, str]:
    """Return the names on disk of tied keys: keys that are not on disk themselves, but share another key's tensor."""
    groups: dict[str, list[str]] = {}
    for target, source in hf.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(target)
    tied = {}
    for group in groups.values():
        held = [key for key in group if key in stored]
        if held:
            tied.update({key: stored[held[0]] for key in group if key not in stored})
    return tied


def _warn_of(unexpected: list[str], hf: PreTrainedModel, path: Path) -> None:
    """Warn of tensors that the model does not use, except those that older checkpoints are known to hold."""
    known = [*(hf._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in known)]
    if unexpected:
        warnings.warn(
            f"{path}: {len(unexpected)} tensors of its weights are not part of the model, such as {unexpected[0]}; "
            "check that its config.json is the right one",
            stacklevel=4,
        )
