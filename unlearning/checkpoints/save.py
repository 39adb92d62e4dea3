"""Write checkpoints that transformers 4 and 5 read alike."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
_TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates."""

_POSITIONS = (
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "global_rope_theta", "local_rope_theta"),
    *("rotary_emb_base", "rotary_pct", "partial_rotary_factor"),
)
"""Fields by which transformers 4 knows rotary embeddings; 5 writes all of them into `rope_parameters`."""


def complete_config(directory: Path, start: str | Path) -> None:
    """Add to a written config.json the fields that transformers 4 reads where 5 reads others.

    transformers 5 writes the rotary embedding as `rope_parameters` and the dtype as `dtype`; 4 ignores both, and
    computes with its defaults. Fields that the start has are copied from it, so that they mean what they meant there.

    Args:
        directory: Directory of the written checkpoint; without a config.json, nothing is done.
        start: Directory of the checkpoint that was trained, or any other name.
    """
    file = directory / "config.json"
    if not file.is_file():
        return
    config = _read(file)
    of_start = Path(start) / "config.json"
    older = _read(of_start) if start and of_start.is_file() else {}
    added = {name: older[name] for name in _POSITIONS if name in older} or _older_positions(config)
    if "dtype" in config:
        added["torch_dtype"] = config["dtype"]
    missing = {name: value for name, value in added.items() if name not in config}
    file.write_text(json.dumps(config | missing, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _older_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers 4's fields for the rotary embedding in a config.json of transformers 5."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    whole, local = rope.get("full_attention"), rope.get("sliding_attention")
    if isinstance(whole, dict) and isinstance(local, dict):
        if config.get("model_type", "").startswith("modernbert"):
            return {"global_rope_theta": whole.get("rope_theta"), "local_rope_theta": local.get("rope_theta")}
        return {**_flat(whole), "rope_local_base_freq": local.get("rope_theta")}
    if "rope_theta" not in rope:
        return {}
    flat = _flat(rope)
    if str(config.get("model_type", "")).startswith("gpt_neox"):
        flat["rotary_emb_base"] = rope["rope_theta"]
        flat["rotary_pct"] = rope.get("partial_rotary_factor", 0.25)
    return flat


def _flat(rope: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    scaled = rest.get("rope_type", "default") != "default"
    fields = {"rope_theta": rope.get("rope_theta"), "rope_scaling": rest if scaled else None}
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return fields


def _read(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path, start: Path | None) -> None:
    """Write a tokenizer: the very files that it was read from, or its own where there are none.

    transformers 5 names classes in `tokenizer_config.json` that 4 does not have.

    Args:
        tokenizer: The tokenizer, unchanged since it was read.
        directory: Directory to write into.
        start: Directory that it was read from; None if it was made in memory.
    """
    files = [] if start is None else [file for name in _TOKENIZER_FILES if (file := start / name).is_file()]
    has_own_code = not type(tokenizer).__module__.startswith("transformers.")  # saved with its code
    if start is None or not files or has_own_code:
        tokenizer.save_pretrained(directory)
        return
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, directory / file.name)
    if (start / _TEMPLATES).is_dir():
        shutil.copytree(start / _TEMPLATES, directory / _TEMPLATES, dirs_exist_ok=True)
