"""The card of a trained model: what was done to which model, with what, and what came of it."""

from typing import Any

from unlearning.methods.method import AnyMethod


def model_card(method: AnyMethod, record: dict[str, Any]) -> str:
    """`README.md` of a run's directory, in the form that the hub reads."""
    configuration = record["configuration"]
    options = "\n".join(f"| `{name}` | {value!r} |" for name, value in configuration["options"].items())
    counts = record["examples"]
    data = "\n".join(
        f"| {name} | {counts.get(name, 'measured only')} | `{configuration[key]}` |"
        for name, key in (("forget", "forget_data"), ("alternate", "alternates_data"), ("retain", "retain_data"))
        if configuration[key] is not None
    )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"""---
base_model: {record["model"]}
library_name: {"peft" if configuration["options"]["lora_rank"] else "transformers"}
tags:
- machine-unlearning
- {configuration["method"]}
---

# {record["model"]} after {configuration["method"]}

{method.summary}{f" ({method.source})" if method.source else ""}.
{record["steps"]} optimizer steps{_ending(record)}, {record["seconds"]:.0f} s on {record["device"]}, with seed
{configuration["options"]["seed"]} for the orders of the examples. Written by `unlearn train`; `unlearning.json` holds
the history.

Start weights: content hash `{configuration["start_weights"]}`.

| data | examples | content hash (SHA-256) |
| --- | --- | --- |
{data}

## Before and after

{_metrics(record)}

## Options

| option | value |
| --- | --- |
{options}

{versions}
"""


def _ending(record: dict[str, Any]) -> str:
    if record["best"] is not None:
        return f", of which the weights after step {record['best']['step']} were kept (best {record['best']['metric']})"
    return f", stopped where {record['stop_rule']}" if record["stopped_at"] is not None else ""


def _metrics(record: dict[str, Any]) -> str:
    evaluations = record["evaluations"]
    if not evaluations:
        return "Not measured."
    first, last = evaluations[0], record["final"]
    names = [name for name in last if name not in ("step", "epoch")]
    rows = "\n".join(f"| {name} | {first.get(name, float('nan')):.4f} | {last[name]:.4f} |" for name in names)
    said = f"\n\nCollapsed at step {record['collapsed_at']}." if record["collapsed_at"] is not None else ""
    sizes = record["evaluated_examples"]
    what = " and ".join(f"{count} {name}" for name, count in sizes.items())
    return f"""On {what} examples of the training data.

| metric | before | after step {int(last["step"])} |
| --- | --- | --- |
{rows}{said}"""
