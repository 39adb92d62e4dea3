"""Constants of the start model that a loss reads: computed once, kept on disk, and the model freed.

A column holds one quantity of one data set. It lies in a file named by the content hash of the model, the token ids
(which are the data and the tokenizer together) and the quantity, so that another model's numbers can never come back.
Where the file would be larger than the budget, a frozen copy of the model is kept instead and asked at every step; the
numbers are the same.
"""

import copy
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unlearning.common.cache import cache_directory
from unlearning.common.errors import InputError
from unlearning.data.batches import LabelledSpan, Span, TokenBatch, collate, n_predicted
from unlearning.methods.method import Reference
from unlearning.objectives.forward import answer_logits, answer_sequence_nll, block_output

Autocast = Callable[[], AbstractContextManager[None]]


class Column(Protocol):
    """One quantity of one data set."""

    def of(self, places: Sequence[int], batch: TokenBatch) -> Tensor:
        """The values of the examples at these places, which `batch` holds in this order, on its device."""


@dataclass(frozen=True)
class StoredColumn:
    """Values on disk: rows `offsets[i]` to `offsets[i + 1]` are example i's.

    Read, not mapped: pages of a mapped file would count as this process's memory.

    Attributes:
        path: the file, as `numpy.save` writes it.
        start: where its values begin, in bytes.
        width: values a row; None where a row is one number.
        offsets: of each example.
    """

    path: Path
    start: int
    width: int | None
    offsets: np.ndarray

    def of(self, places: Sequence[int], batch: TokenBatch) -> Tensor:
        """The examples' rows, one after the other.

        Raises:
            InputError: the file is gone, or was cut short since training began.
        """
        row = self.width or 1
        ranges = [(int(self.offsets[place]), int(self.offsets[place + 1])) for place in places]
        read = np.empty(row * sum(last - first for first, last in ranges), dtype="<f4")
        done = 0
        try:
            with self.path.open("rb") as file:
                for first, last in ranges:  # into its place: as parts to be joined the logits would be there twice
                    file.seek(self.start + 4 * row * first)
                    part = read[done : done + row * (last - first)]
                    if file.readinto(part.data) < part.nbytes:
                        raise OSError("cut short")
                    done += len(part)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error} while training; run it again") from None
        values = torch.from_numpy(read).to(batch.input_ids.device)
        return values if self.width is None else values.view(-1, self.width)


@dataclass(frozen=True)
class LiveColumn:
    """A frozen copy of the start model, which is asked at every step."""

    model: PreTrainedModel
    reference: Reference
    autocast: Autocast

    def of(self, places: Sequence[int], batch: TokenBatch) -> Tensor:  # noqa: ARG002
        """What the start model says of the batch."""
        return evaluate(self.model, batch, self.reference, self.autocast)


@dataclass(frozen=True)
class References:
    """All columns that a method reads."""

    columns: Mapping[Reference, Column]

    def attach(self, data: str, places: Sequence[int], batch: TokenBatch) -> TokenBatch:
        """The batch with the constants of its examples; `data` is forget, alternate or retain."""
        for reference, column in self.columns.items():
            if reference.data == data:
                values = column.of(places, batch)
                batch = replace(
                    batch,
                    reference_nll=values if reference.quantity == "nll" else batch.reference_nll,
                    reference_logits=values if reference.quantity == "logits" else batch.reference_logits,
                    reference_hidden=values if reference.quantity == "hidden" else batch.reference_hidden,
                )
        return batch


@torch.no_grad()
def evaluate(model: PreTrainedModel, batch: TokenBatch, reference: Reference, autocast: Autocast) -> Tensor:
    """One batch's values, in float32 on the batch's device: [batch], [token, vocab] or [all tokens, d_model]."""
    with autocast():
        if reference.quantity == "nll":
            return answer_sequence_nll(model, batch).float()
        if reference.quantity == "logits":
            return answer_logits(model, batch).logits.float()
        assert reference.layer is not None
        return block_output(model, batch, reference.layer).float()


def compute_references(
    model: PreTrainedModel,
    model_hash: str,
    spans: Mapping[str, Sequence[Span]],
    references: Iterable[Reference],
    *,
    batch_size: int,
    budget: float,
    precision: str,
    autocast: Autocast,
    main_first: Callable[[], AbstractContextManager[None]],
    advance: Callable[[int, int], None],
) -> References:
    """Compute what is not on disk yet, without dropout, from the very model that is then trained.

    Args:
        model: the start model, on its device.
        model_hash: its `content_hash`.
        spans: the data sets by name.
        references: what to compute.
        batch_size: sequences at a time.
        budget: largest file in GB (10^9 bytes); above it a copy of the model is kept.
        precision: the option of that name: numbers of another precision are other numbers.
        autocast: the context of mixed precision.
        main_first: a context in which the other processes wait for the main one.
        advance: called with how many of how many examples are done.

    Raises:
        InputError: the disk is full, or the directory cannot be written.
    """
    columns: dict[Reference, Column] = {}
    copied: PreTrainedModel | None = None
    was_training = model.training
    model.eval()
    try:
        for reference in dict.fromkeys(references):
            data = spans[reference.data]
            offsets = np.concatenate([[0], np.cumsum([_n_rows(span, reference) for span in data])])
            width = _width(model, reference)
            if reference.quantity != "nll" and 4e-9 * offsets[-1] * width > budget:
                if copied is None:
                    copied = _frozen_copy(model)
                columns[reference] = LiveColumn(copied, reference, autocast)
                continue
            path = cache_directory("reference") / f"{_key(model_hash, data, reference, precision)}.npy"
            shape = (int(offsets[-1]),) if reference.quantity == "nll" else (int(offsets[-1]), width)
            with main_first():
                if _start_of_values(path, shape) is None:
                    _write(path, shape, offsets, model, data, reference, batch_size, autocast, advance)
            start = _start_of_values(path, shape)
            if start is None:
                raise InputError(f"{path}: the main process wrote it and this one cannot read it; share the directory")
            columns[reference] = StoredColumn(path, start, shape[1] if len(shape) > 1 else None, offsets)
    finally:
        model.train(was_training)
    return References(columns)


def _n_rows(span: Span, reference: Reference) -> int:
    if reference.quantity == "nll":
        return 1
    return n_predicted(span) if reference.quantity == "logits" else len(span.input_ids)


def _width(model: PreTrainedModel, reference: Reference) -> int:
    config = model.config.get_text_config()
    return int(config.vocab_size if reference.quantity == "logits" else config.hidden_size)


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied


def _key(model_hash: str, data: Sequence[Span], reference: Reference, precision: str) -> str:
    digest = hashlib.sha256(f"{model_hash} {reference.quantity} {reference.layer} {precision}\n".encode())
    for span in data:
        where = [span.targets, span.mask] if isinstance(span, LabelledSpan) else [span.answer_start]
        digest.update(json.dumps([span.input_ids, *where]).encode())
    return digest.hexdigest()[:32]


def _start_of_values(path: Path, shape: tuple[int, ...]) -> int | None:
    """Where the column's values begin in its file; None where there is none or it is not whole."""
    try:
        rows = np.load(path, mmap_mode="r")  # which compares the file's size with its header
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(rows, np.memmap) and rows.shape == shape and rows.dtype == np.float32
    return rows.offset if whole else None


def _write(
    path: Path,
    shape: tuple[int, ...],
    offsets: np.ndarray,
    model: PreTrainedModel,
    data: Sequence[Span],
    reference: Reference,
    batch_size: int,
    autocast: Autocast,
    advance: Callable[[int, int], None],
) -> None:
    """Fill a file beside `path`, then rename it: a computation that is stopped leaves nothing under its name."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            start = file.tell()
            # Written, not mapped: a full disk is an error here and would be a crash there.
            file.truncate(start + 4 * int(np.prod(shape)))
            row_bytes = 4 * (shape[1] if len(shape) > 1 else 1)
            order = sorted(range(len(data)), key=lambda place: len(data[place].input_ids))
            for first in range(0, len(order), batch_size):
                places = order[first : first + batch_size]
                batch = collate([data[place] for place in places]).to(model.device)
                values = evaluate(model, batch, reference, autocast).cpu().numpy()
                sizes = [int(offsets[place + 1] - offsets[place]) for place in places]
                for place, part in zip(places, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
                    file.seek(start + row_bytes * int(offsets[place]))
                    file.write(np.ascontiguousarray(part).data)
                advance(first + len(places), len(order))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        what = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
        raise InputError(
            f"{path.parent}: {what} for {4e-9 * np.prod(shape):.2g} GB of the start model's {reference.quantity}; "
            "set UNLEARNING_CACHE to another directory, or lower reference_budget to keep the model in memory instead"
        ) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
