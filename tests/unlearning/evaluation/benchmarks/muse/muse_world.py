"""Invented data in MUSE's format: lighthouses and their keepers."""

import json
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from tests.unlearning.data.helpers import write_parquet
from tests.unlearning.helpers import NAMES, TOWNS, build_tiny_llama

Parts = dict[str, dict[str, list[dict[str, Any]]]]


def muse_parts(n: int = 4) -> Parts:
    """Every part of MUSE-News, a few rows each."""

    def question(place: int, what: str) -> dict[str, Any]:
        return {"question": f"Who kept the {what} of {TOWNS[place % 8]}?", "answer": NAMES[(3 * place) % 8]}

    def article(kind: str, place: int) -> dict[str, Any]:
        return {"text": f"The {kind} {place} of {TOWNS[place % 8]} was kept by {NAMES[(5 * place) % 8]}."}

    return {
        "verbmem": {
            "forget": [
                {"prompt": f"The lamp of {TOWNS[place % 8]}", "gt": " ".join([f"was lit by {NAMES[place % 8]}"] * 6)}
                for place in range(n)
            ]
        },
        "knowmem": {
            "forget_qa": [question(place, "lamp") for place in range(n)],
            "forget_qa_icl": [question(place, "horn") for place in range(3)],
            "retain_qa": [question(place, "well") for place in range(n)],
            "retain_qa_icl": [question(place, "bell") for place in range(2)],
        },
        "privleak": {
            name: [article(kind, place) for place in range(n)]
            for name, kind in (("forget", "lamp"), ("holdout", "gate"))
        },
        "raw": {"retain1": [article("well", place) for place in range(n)]},
        "scal": {f"forget_{k}": [article("lamp", place) for place in range(2 * k)] for k in range(1, 5)},
        "sust": {f"forget_{k}": [article("lamp", place) for place in range(2 * k - 2, 2 * k)] for k in range(1, 5)},
    }


def write_hub(directory: Path, parts: Parts) -> Path:
    """The parts as the hub has them: parquet files that a card names."""
    card = ["---", "configs:"]
    for config, splits in parts.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, records in splits.items():
            write_parquet(directory / config / f"{split}-00000-of-00001.parquet", records)
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (directory / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return directory


def write_repository(directory: Path, parts: Parts) -> Path:
    """The parts as MUSE's repository has them: JSON files, where `retain` is `retain2`."""
    for config, splits in parts.items():
        for split, records in splits.items():
            name = split.replace("retain_qa", "retain2_qa")
            (directory / config).mkdir(parents=True, exist_ok=True)
            (directory / config / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return directory


def build_long_llama(seed: int = 0) -> LlamaForCausalLM:
    """A tiny Llama with room for worked examples."""
    model = build_tiny_llama(seed)
    model.config.max_position_embeddings = 512
    return model
