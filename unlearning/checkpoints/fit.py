"""Compare a configuration with the headers of the weight files, before any memory is taken for a model.

A configuration is a stranger's: a model of its sizes may be a million layers, or more than the memory holds.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from unlearning.checkpoints.headers import Header
from unlearning.checkpoints.keys import Places, check_single, find_places
from unlearning.checkpoints.quantized import check_places, check_unexpected
from unlearning.common.errors import InputError

_APART = "the files do not belong together"

_SLACK = 4
"""How many parameters a model may have for each value on disk: four-bit weights are two in a byte."""

_TABLES = 2**32
"""Bytes that a model's buffers may take however small its files are: masks and tables of positions."""


def check_fit(
    path: Path, config: PretrainedConfig, headers: Mapping[str, Header], *, quantized: bool, trust_remote_code: bool
) -> PreTrainedModel | None:
    """Check that the tensors on disk are those of the configured model, which is built without memory.

    Args:
        path: Directory of the checkpoint, for messages.
        config: Its configuration.
        headers: Header of every tensor on disk, by name.
        quantized: Whether the weights are quantized: then only the number of values is compared.
        trust_remote_code: Run model code that comes with the checkpoint.

    Returns:
        The model without memory, on the meta device; None if it cannot be built so, and nothing was compared.

    Raises:
        InputError: A tensor on disk has another shape than in the model or is stored as integers (see
            `check_tensors`), or the model has far more parameters, or larger buffers, than the files account for.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code
            )
    except Exception:  # what reads the weights says why; some models compute with values while they are built
        return None
    if not quantized:
        check_tensors(model, headers, path)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_stored = sum(header.n_values for header in headers.values())
    if n_parameters > _SLACK * n_stored:
        raise InputError(
            f"{path}: its config.json describes a model of {n_parameters:,} parameters, and its weights hold "
            f"{n_stored:,} values; {_APART}"
        )
    name, largest = max(((name, buffer.nbytes) for name, buffer in model.named_buffers()), key=_second, default=("", 0))
    if sum(buffer.nbytes for buffer in model.buffers()) > _TABLES + _SLACK * n_stored:
        raise InputError(
            f"{path}: with the sizes in its config.json the table {name} takes {largest / 2**30:,.0f} GiB; correct "
            "max_position_embeddings or n_positions there"
        )
    return model


def _second(pair: tuple[str, int]) -> int:
    return pair[1]


def check_tensors(model: PreTrainedModel, headers: Mapping[str, Header], path: Path) -> Places:
    """Find the places of the tensors on disk in a model, and check that they fit there.

    Args:
        model: The model; its parameters may be on the meta device.
        headers: Header of every tensor on disk, by name.
        path: Directory of the checkpoint, for messages.

    Returns:
        The places.

    Raises:
        InputError: A tensor has another shape than in the model, is stored as integers, is there twice, or belongs to
            quantized weights or to an adapter.
    """
    places = find_places(model, headers)
    check_unexpected(places.unexpected, path)
    check_places(places, headers, model, path)
    check_single(places, path)
    wanted = model.state_dict()
    for key, name in places.stored.items():
        if headers[name].shape != tuple(wanted[key].shape):
            raise InputError(
                f"{path}: the tensor {name} has shape {headers[name].shape}, and its config.json wants "
                f"{tuple(wanted[key].shape)}; {_APART}"
            )
    return places
