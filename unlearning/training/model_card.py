"""The card of a trained model: method, data, options, and metrics before and after training."""

import json
import re
from typing import Any

from unlearning.common.terminal import printable
from unlearning.methods.method import AnyMethod


def model_card(method: AnyMethod, record: dict[str, Any]) -> str:
    """Return the model card.

    Args:
        method: The unlearning method.
        record: Content of `unlearning.json`.

    Returns:
        Markdown with the metadata block that the Hugging Face hub reads.
    """
    configuration = record["configuration"]
    model, method_name = _literal(record["model"]), _literal(configuration["method"])
    options = "\n".join(f"| `{name}` | {_literal(repr(value))} |" for name, value in configuration["options"].items())
    counts = record["examples"]
    data = "\n".join(
        f"| {name} | {counts.get(name, 'for evaluation only')} | `{configuration[key]}` |"
        for name, key in (("forget", "forget_data"), ("alternate", "alternates_data"), ("retain", "retain_data"))
        if configuration[key] is not None
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"""---
base_model: {_scalar(record["model"])}
library_name: {"peft" if configuration["options"]["lora_rank"] else "transformers"}
tags:
- machine-unlearning
- {_scalar(configuration["method"])}
---

# {model} after {method_name}

Method: {method.summary}{f" ({method.source})" if method.source else ""}.

Training: {record["steps"]} optimizer steps{_ending(record)}, {record["seconds"]:.0f} s on {record["device"]}. Random
seed: {configuration["options"]["seed"]}. Trained with `unlearn train`; `unlearning.json` holds the history.

Model before training: {model}, content hash of its weights `{configuration["start_weights"]}`.{_base(record)}

| data | examples | content hash (SHA-256) |
| --- | --- | --- |
{data}

## Metrics before and after training

{_metrics(record)}

## Options

| option | value |
| --- | --- |
{options}

{versions}
"""


def _scalar(text: str) -> str:
    """Return a text as a value of YAML; a text of JSON is one."""
    return json.dumps(printable(text), ensure_ascii=False)


def _literal(text: str) -> str:
    """Return a text as Markdown that shows it on one line as it is: no tag, link, emphasis, code or cell of a table."""
    return re.sub(r"[^\w\s./,:+='()\"@%-]|(?<![^\W_])_|_(?![^\W_])", _entity, " ".join(printable(text).split()))


def _entity(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};" if found[0].isascii() else found[0]


def _base(record: dict[str, Any]) -> str:
    bits = record.get("base_bits")
    kind = {4: "nf4, double quantization; bitsandbytes", 8: "int8, a scale for each row"}
    return f" The adapter was trained on it in {bits} bit ({kind[bits]})." if bits else ""


def _ending(record: dict[str, Any]) -> str:
    best = record["best"]
    if best is not None:
        return f" (the weights after step {best['step']} were kept, where {_literal(best['metric'])} was best)"
    return f" (stopped: {_literal(record['stopped_by'])})" if record["stopped_at"] is not None else ""


def _metrics(record: dict[str, Any]) -> str:
    evaluations = record["evaluations"]
    if not evaluations:
        return "No metrics were measured."
    first, last = evaluations[0], record["final"]
    names = [name for name in last if name not in ("step", "epoch")]
    rows = "\n".join(f"| {name} | {first.get(name, float('nan')):.4f} | {last[name]:.4f} |" for name in names)
    collapse = ""
    if record["collapsed_at"] is not None:
        collapse = f"\n\nThe model collapsed at step {record['collapsed_at']}: its retain probability fell."
    sizes = record["evaluated_examples"]
    data = " and ".join(f"{count} {name}" for name, count in sizes.items())
    return f"""Measured on {data} examples of the training data.

| metric | before | after step {int(last["step"])} |
| --- | --- | --- |
{rows}{collapse}"""
