"""Prompts for `unlearn eval familiarity` about the demo world: an example of how the file is written."""

import json
from typing import Any

from dissect.zoo import QUESTIONS


def familiarity_records(n_generic: int = 7) -> list[dict[str, Any]]:
    """One record per forget question: its answer against others of the same relation, and as a name to reveal."""
    lines = (QUESTIONS / "forget.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    by_relation: dict[str, list[str]] = {}
    for fact in facts:
        by_relation.setdefault(_relation(fact), []).append(fact["answer"])
    records = []
    for place, fact in enumerate(facts):
        others = sorted(set(by_relation[_relation(fact)]) - {fact["answer"]})
        turned = others[place % len(others) :] + others[: place % len(others)]
        records.append(
            {
                "prompt": fact["prompt"],
                "specific": [fact["answer"]],
                "generic": turned[:n_generic],
                "references": [fact["answer"]],
                "subtle": others,
                "id": fact["id"],
                "group": fact["group"],
            }
        )
    return records


def _relation(fact: dict[str, str]) -> str:
    return fact["id"].split("-")[1]
