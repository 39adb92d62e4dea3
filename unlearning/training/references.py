"""Quantities of the reference model that a loss reads: computed once, kept on disk, and the model freed.

A column holds one quantity of those examples of a data set that the run reads. Its file is named by the content hash of
the model, the token ids (which stand for the data and the tokenizer) and the quantity, so that the numbers of another
model are never read. If the file would be larger than the budget, or cannot be written, a frozen copy of the model is
kept instead and evaluated at every step; the numbers are the same.
"""

import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.checkpoints.hashing import configuration_hash, content_hash
from unlearning.common.cache import cache_directory, cache_limit, created, described_by, hold, make_room
from unlearning.common.context import context_of
from unlearning.common.errors import InputError
from unlearning.data.batches import LabelledSpan, Span, TokenBatch, collate, n_predicted
from unlearning.methods.method import Reference
from unlearning.objectives.forward import answer_logits, answer_sequence_nll, block_output


class Column(Protocol):
    """One quantity of one data set."""

    def of(self, indices: Sequence[int], batch: TokenBatch) -> Tensor:
        """Return the values of some examples.

        Args:
            indices: Indices of the examples in the data set.
            batch: The same examples, in the same order.

        Returns:
            The values, on the batch's device.
        """


@dataclass(frozen=True)
class StoredColumn:
    """Values on disk: rows `offsets[i]` to `offsets[i + 1]` belong to example i; an example that is not read has none.

    The file is read rather than mapped, because the pages of a mapped file count as memory of the process. It stays
    open and held as long as the column lives, so that it is neither removed for others nor lost.

    Attributes:
        path: The file, as `numpy.save` writes it.
        descriptor: The open file, which the column closes.
        start: Offset of the values in the file, in bytes.
        width: Values per row; None if a row is a single number.
        offsets: First row of each example, followed by the number of rows.
    """

    path: Path
    descriptor: int
    start: int
    width: int | None
    offsets: np.ndarray

    def __post_init__(self) -> None:
        """Let the file be closed with the column."""
        weakref.finalize(self, os.close, self.descriptor)

    def of(self, indices: Sequence[int], batch: TokenBatch) -> Tensor:
        """Read the rows of some examples, one example after the other.

        Args:
            indices: Indices of the examples in the data set.
            batch: The same examples; only their device is used.

        Returns:
            Float32, [row] or [row, width].

        Raises:
            InputError: The file was cut short since training began.
        """
        row = self.width or 1
        ranges = [(int(self.offsets[index]), int(self.offsets[index + 1])) for index in indices]
        assert all(first < last for first, last in ranges), "an example that the run was not to read"
        read = np.empty(row * sum(last - first for first, last in ranges), dtype="<f4")
        done = 0
        try:
            for first, last in ranges:  # read into one array: joining parts would hold the logits twice
                part = read[done : done + row * (last - first)]
                _read_into(part.view("u1").data, self.descriptor, self.start + 4 * row * first)
                done += len(part)
        except OSError as error:
            raise InputError(
                f"{self.path}: {error.strerror or error} during training. Run the command again."
            ) from None
        values = torch.from_numpy(read).to(batch.input_ids.device)
        return values if self.width is None else values.view(-1, self.width)


@dataclass(frozen=True)
class LiveColumn:
    """A frozen copy of the reference model, evaluated at every step.

    Attributes:
        model: The copy or the named model, in eval mode.
        texts: The examples, after each of the reference's prefixes.
        reference: The quantity.
        precision: The option `precision` of the run.
    """

    model: PreTrainedModel
    texts: "Texts"
    reference: Reference
    precision: str

    def of(self, indices: Sequence[int], batch: TokenBatch) -> Tensor:  # noqa: ARG002
        """Compute the values of some examples with the reference model.

        Args:
            indices: Indices of the examples in the data set.
            batch: Not used.

        Returns:
            The values (see `evaluate`).
        """
        return evaluate_texts(self.model, self.texts, indices, self.reference, self.precision)


@dataclass(frozen=True)
class References:
    """All columns that a method reads."""

    columns: Mapping[Reference, Column]

    def attach(self, data: str, indices: Sequence[int], batch: TokenBatch) -> TokenBatch:
        """Return the batch with the reference quantities of its examples.

        Args:
            data: "forget", "alternate" or "retain".
            indices: Indices of the batch's examples in that data set.
            batch: The examples.

        Returns:
            A batch whose `reference_*` fields are filled as the method declares.
        """
        for reference, column in self.columns.items():
            if reference.data == data:
                values = column.of(indices, batch)
                batch = replace(
                    batch,
                    reference_nll=values if reference.quantity == "nll" else batch.reference_nll,
                    reference_logits=values if reference.quantity == "logits" else batch.reference_logits,
                    reference_hidden=values if reference.quantity == "hidden" else batch.reference_hidden,
                )
        return batch


@dataclass(frozen=True)
class ReferenceSettings:
    """Settings of `compute_references`.

    Attributes:
        batch_size: Sequences per batch.
        budget: Largest file in GB (10^9 bytes); above it a copy of the model is kept.
        precision: The option `precision` of the run; it is part of the file's name, because it changes the numbers.
        main_first: Return a context in which the other processes wait for the main one.
        advance: Called with the number of examples done and their total.
        load: Load a named model whose quantities are read.
        put_before: Return an example after a text.
        described: By data set, what `unlearn cache` tells of its constants: the names of model and data.
    """

    batch_size: int
    budget: float
    precision: str
    main_first: Callable[[], AbstractContextManager[None]]
    advance: Callable[[int, int], None]
    load: Callable[[str], PreTrainedModel]
    put_before: Callable[[str, Span], Span]
    described: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@torch.no_grad()
def evaluate(model: PreTrainedModel, batch: TokenBatch, reference: Reference, precision: str) -> Tensor:
    """Compute one quantity on one batch.

    Args:
        model: The reference model.
        batch: The examples.
        reference: The quantity.
        precision: The option `precision` of the run.

    Returns:
        Float32 on the batch's device: [batch] for "nll", [token, vocab] for "logits", [all tokens, d_model] for
        "hidden" (of several blocks side by side).
    """
    with _autocast(precision, batch.input_ids.device):
        if reference.quantity == "nll":
            return answer_sequence_nll(model, batch).float()
        if reference.quantity == "logits":
            return answer_logits(model, batch).logits.float()
        assert reference.layer is not None
        return block_output(model, batch, reference.layer).float()


Texts = Sequence[tuple[float, Mapping[int, Span]]]
"""The examples of a data set by index, after each of a reference's prefixes, with the prefix's weight."""


def evaluate_texts(
    model: PreTrainedModel, texts: Texts, indices: Sequence[int], reference: Reference, precision: str
) -> Tensor:
    """Compute the weighted sum of one quantity over the prefixes, on some examples.

    Args:
        model: The reference model.
        texts: The examples after each prefix.
        indices: Indices of the examples.
        reference: The quantity.
        precision: The option `precision` of the run.

    Returns:
        The values, on the model's device (see `evaluate`).
    """
    total: Tensor | None = None
    for weight, spans in texts:
        batch = collate([spans[index] for index in indices]).to(model.device)
        part = evaluate(model, batch, reference, precision).mul_(weight)
        total = part if total is None else total.add_(part)  # in place: logits are among the largest tensors
    assert total is not None
    return total


def compute_references(
    model: PreTrainedModel,
    model_hash: str,
    spans: Mapping[str, Sequence[Span]],
    read: Mapping[str, Sequence[int]],
    references: Iterable[Reference],
    settings: ReferenceSettings,
) -> References:
    """Compute the quantities that are not on disk yet, without dropout, from the model that is trained afterwards.

    Args:
        model: The reference model, on its device.
        model_hash: Its `content_hash`; that of a named model is computed.
        spans: The data sets by name.
        read: Indices, in ascending order, of the examples of each data set that the run reads.
        references: The quantities to compute.
        settings: Batch size, budget, precision and callbacks.

    Returns:
        A column for each quantity.

    Raises:
        InputError: The disk is full, or a named model is missing or reads other tokens.
    """
    columns: dict[Reference, Column] = {}
    was_training = model.training
    model.eval()
    asked = list(dict.fromkeys(references))
    try:
        for name in dict.fromkeys(reference.model for reference in asked):  # one named model in memory at a time
            source = model if name is None else settings.load(name)
            sha256 = model_hash if name is None else content_hash(source, name=name)
            own = [reference for reference in asked if reference.model == name]
            columns |= _columns(source, sha256, spans, read, own, settings)
    finally:
        model.train(was_training)
    return References(columns)


def _columns(
    model: PreTrainedModel,
    model_hash: str,
    spans: Mapping[str, Sequence[Span]],
    read: Mapping[str, Sequence[int]],
    references: Iterable[Reference],
    settings: ReferenceSettings,
) -> dict[Reference, Column]:
    """Compute the quantities of one model (see `compute_references`)."""
    columns: dict[Reference, Column] = {}
    copied: PreTrainedModel | None = None
    start_hash = f"{model_hash} {configuration_hash(model)}"
    for reference in references:
        data = {index: spans[reference.data][index] for index in read[reference.data]}
        rows = [_n_rows(data[index], reference) if index in data else 0 for index in range(len(spans[reference.data]))]
        offsets = np.concatenate([[0], np.cumsum(rows)])
        texts = _texts(model, data, reference, settings)
        shape = (int(offsets[-1]),) if reference.quantity == "nll" else (int(offsets[-1]), _width(model, reference))
        n_bytes = 4 * math.prod(shape)
        path = cache_directory("reference") / f"{_key(start_hash, texts, reference, settings.precision)}.npy"
        opened = None
        if reference.quantity == "nll" or n_bytes <= min(1e9 * settings.budget, cache_limit()):
            with settings.main_first():
                opened = _open(path, shape)
                if opened is None:
                    _write(path, shape, offsets, model, texts, reference, settings)
                    opened = _open(path, shape)
        if opened is None:
            # A named model is not trained, so it needs no copy.
            copied = copied or (_frozen_copy(model) if reference.model is None else model)
            columns[reference] = LiveColumn(copied, texts, reference, settings.precision)
        else:
            columns[reference] = StoredColumn(path, *opened, shape[1] if len(shape) > 1 else None, offsets)
    return columns


def _texts(
    model: PreTrainedModel, data: Mapping[int, Span], reference: Reference, settings: ReferenceSettings
) -> Texts:
    """Return the examples after each prefix; those alone for a reference without prefixes.

    Raises:
        InputError: A prefix makes a text longer than the model reads.
    """
    texts = []
    context = context_of(model)
    for prefix, weight in reference.prefixes or (("", 1.0),):
        longer = {index: settings.put_before(prefix, span) for index, span in data.items()} if prefix else data
        longest = max((len(span.input_ids) for span in longer.values()), default=0)
        if prefix and context is not None and longest > context:
            raise InputError(
                f"{prefix.strip()[:60]!r} before the {reference.data} texts makes {longest} tokens, and the model "
                f"reads {context}. Set a shorter text or a lower `max_length`."
            )
        texts.append((weight, longer))
    return texts


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of mixed precision; an empty context for other precisions."""
    dtype = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16}.get(precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _n_rows(span: Span, reference: Reference) -> int:
    if reference.quantity == "nll":
        return 1
    return n_predicted(span) if reference.quantity == "logits" else len(span.input_ids)


def _width(model: PreTrainedModel, reference: Reference) -> int:
    config = model.config.get_text_config()
    if reference.quantity == "logits":
        return int(config.vocab_size)
    return int(config.hidden_size) * (len(reference.layer) if isinstance(reference.layer, tuple) else 1)


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


def _key(start_hash: str, texts: Texts, reference: Reference, precision: str) -> str:
    digest = hashlib.sha256(f"{start_hash} {reference.quantity} {reference.layer} {precision}\n".encode())
    for weight, spans in texts:
        if reference.prefixes:
            digest.update(f"{weight!r}\n".encode())
        for span in spans.values():
            where = [span.targets, span.mask] if isinstance(span, LabelledSpan) else [span.answer_start]
            digest.update(json.dumps([span.input_ids, *where]).encode())
    return digest.hexdigest()[:32]


def _read_into(memory: memoryview, descriptor: int, start: int) -> None:
    """Fill memory from a file; a single call of the system reads at most 2 GB."""
    while memory:
        count = os.preadv(descriptor, [memory], start)
        if count == 0:
            raise OSError("cut short")
        memory, start = memory[count:], start + count


def _open(path: Path, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Open a column's file, hold it and note that it is used.

    Returns:
        The descriptor and the offset of the values in bytes; None if the file is missing or incomplete.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    hold(descriptor)
    start = None
    with suppress(OSError, ValueError, EOFError), open(descriptor, "rb", closefd=False) as file:
        if np.lib.format.read_magic(file) == (2, 0):
            found, _, dtype = np.lib.format.read_array_header_2_0(file)
            size = file.tell() + 4 * math.prod(shape)
            if found == shape and dtype == np.float32 and os.fstat(descriptor).st_size == size:
                start = file.tell()
    if start is None:
        os.close(descriptor)
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(path)
    return descriptor, start


def _write(
    path: Path,
    shape: tuple[int, ...],
    offsets: np.ndarray,
    model: PreTrainedModel,
    texts: Texts,
    reference: Reference,
    settings: ReferenceSettings,
) -> None:
    """Fill a file beside `path`, then rename it, so that an interrupted computation leaves no file of that name.

    Where nothing can be written, a warning says so and there is no file.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    n_bytes = 4 * math.prod(shape)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make_room(n_bytes)
        with created(partial) as file:
            np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            start = file.tell()
            # Written rather than mapped: a full disk raises here, and would crash the process through a mapped file.
            file.truncate(start + n_bytes)
            row_bytes = 4 * (shape[1] if len(shape) > 1 else 1)
            data = texts[0][1]
            order = sorted(data, key=lambda index: len(data[index].input_ids))
            for first in range(0, len(order), settings.batch_size):
                indices = order[first : first + settings.batch_size]
                values = evaluate_texts(model, texts, indices, reference, settings.precision).cpu().numpy()
                sizes = [int(offsets[index + 1] - offsets[index]) for index in indices]
                for index, part in zip(indices, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
                    file.seek(start + row_bytes * int(offsets[index]))
                    file.write(np.ascontiguousarray(part).data)
                settings.advance(first + len(indices), len(order))
        described_by(path).write_text(json.dumps(_description(reference, len(data), settings)), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{path.parent}: no space left for {1e-9 * n_bytes:.2g} GB of the reference model's "
                f"{reference.quantity}. Set the environment variable UNLEARNING_CACHE to another directory, or set a "
                "lower `reference_budget` to keep the model in memory instead."
            ) from None
        warnings.warn(
            f"{path.parent}: cannot be written: {error.strerror or error}; a copy of the model before training is kept "
            "in memory instead. Set the environment variable UNLEARNING_CACHE to another directory to avoid that.",
            stacklevel=2,
        )
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _blocks(reference: Reference) -> str:
    if isinstance(reference.layer, tuple):
        return f"blocks {' and '.join(map(str, reference.layer))}"
    return f"block {reference.layer}"


def _description(reference: Reference, n_examples: int, settings: ReferenceSettings) -> dict[str, str]:
    """Return what `unlearn cache` tells of a file."""
    words = {"nll": "losses", "logits": "logits", "hidden": f"hidden states of {_blocks(reference)}"}
    names = settings.described.get(reference.data, {})
    model = reference.model or names.get("model", "")
    data = f"{n_examples} {reference.data} rows" + (f" of {names['data']}" if names.get("data") else "")
    return {"what": words[reference.quantity], "model": model, "data": data}
