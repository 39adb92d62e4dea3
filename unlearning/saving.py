"""A trained model on disk: weights, tokenizer and `unlearning.json`, all of it or nothing."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.checkpoints import without_bars
from unlearning.data.question_answer import Example
from unlearning.errors import InputError

RECORD = "unlearning.json"


def hash_examples(examples: Sequence[Example] | None) -> str | None:
    """SHA-256 of the examples' texts in their order; None where there are none."""
    if examples is None:
        return None
    text = json.dumps([asdict(example) for example in examples], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions that decide the numbers."""
    return {name: version(name) for name in ("dissect-unlearning", "torch", "transformers", "accelerate")}


def read_finished(output_dir: Path, configuration: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished run of this very configuration in `output_dir`; None where the directory is free.

    Raises:
        InputError: the directory holds something else; names the first thing that differs.
    """
    if not output_dir.exists():
        return None
    if not output_dir.is_dir():
        raise InputError(f"{output_dir}: a file is in the way; choose another output directory")
    if not any(output_dir.iterdir()):
        return None
    try:
        record = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))
        done = record["configuration"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{output_dir}: holds other files; choose another output directory or empty it") from None
    for name, value in configuration.items():
        if done.get(name) != value:
            raise InputError(
                f"{output_dir}: holds a model of another configuration ({_difference(name, done.get(name), value)}); "
                "choose another output directory or remove it"
            )
    return record


def save_run(
    output_dir: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
) -> None:
    """Write everything beside `output_dir`, then rename: an interrupted run leaves nothing under its name."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = output_dir.parent / f".{output_dir.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with without_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, output_dir)  # onto nothing, or onto an empty directory
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _difference(name: str, done: Any, wanted: Any) -> str:
    if isinstance(done, dict) and isinstance(wanted, dict):
        for key in wanted:
            if done.get(key) != wanted[key]:
                return f"{key}: {done.get(key)!r} there, {wanted[key]!r} now"
    if isinstance(wanted, str) and len(wanted) == 64:
        return f"another {name.replace('_', ' ')}"
    return f"{name}: {done!r} there, {wanted!r} now"
