"""Make the constructed models: one function per way, from a family to a model."""

import random
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from analyses.unlearning_methods import Entry, needs_retain
from analyses.verdict_benchmark.families import Family, build, finetuned
from dissect.zoo.builder import base_texts, never_texts
from dissect.zoo.world import World, anchors
from unlearning import Example, train
from unlearning.checkpoints.load import load_weights
from unlearning.data.batches import collate
from unlearning.data.encoding import encode
from unlearning.methods.whp.anchors import write_anchors
from unlearning.objectives.forward import answer_logits

ADAPTER: dict[str, Any] = {"lora_rank": 8, "learning_rate": 2e-3, "epochs": 3, "batch_size": 32}
SHRINK = 0.8
DISTIL_RATE = 3e-3
DISTIL_PASSES = 2
"""Passes over the texts that the control was trained on; one pass is not enough after so much was destroyed."""


def unlearned(
    family: Family, method: str, options: Mapping[str, Any], *, start: str | PreTrainedModel = "base"
) -> PreTrainedModel:
    """Unlearn a model by a method, on all trained forget questions.

    Args:
        family: The family.
        method: Name of the method.
        options: Options of the method.
        start: Name of the model in the family, or a model of the same shape.

    Returns:
        The unlearned model.
    """
    own = dict(options)
    if method == "whp":
        own["anchors"] = str(_anchor_file(family))
    return train(
        method,
        model=family.load(start) if isinstance(start, str) else start,
        tokenizer=family.tokenizer,
        forget=family.forget,
        retain=family.retain if needs_retain(Entry(method, method, own)) else None,
        progress=False,
        seed=family.seed,
        device="cpu",
        gradient_accumulation_steps=1,
        **{"batch_size": 32, **own},
    ).model


def _anchor_file(family: Family) -> Path:
    path = family.path / "anchors.json"
    write_anchors(path, anchors(family.world))
    return path


def never(family: Family, order: int) -> PreTrainedModel:
    """Train a model without the knowledge, on the control's texts in another order.

    Args:
        family: The family.
        order: Number of the order.

    Returns:
        The model.
    """
    return finetuned(family, never_texts(family.world, family.recipe), order=order)


def shrunk_and_noised(family: Family) -> PreTrainedModel:
    """Return the base with every matrix shrunk and noise of a fresh model's size added (UNDO's perturbation)."""
    model = family.load("base")
    generator = torch.Generator().manual_seed(family.seed)
    std = float(getattr(model.config, "initializer_range", 0.02))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator) * std
                parameter.mul_(1 - SHRINK).add_(SHRINK * noise)
    return model


def distilled(family: Family) -> PreTrainedModel:
    """Distil a model without the knowledge into the shrunk and noised base, on that model's own texts."""
    student, teacher = shrunk_and_noised(family), family.load("never-order1")
    texts = [Example(prompt, answer) for prompt, answer in never_texts(family.world, family.recipe)] * DISTIL_PASSES
    random.Random(family.seed).shuffle(texts)
    spans = encode(family.tokenizer, texts, append_eos=True, max_length=None).spans
    size = family.recipe.finetuning.batch_size
    batches = [spans[first : first + size] for first in range(0, len(spans), size)]
    optimizer = torch.optim.AdamW(student.parameters(), lr=DISTIL_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=len(batches))
    student.train()
    for some in batches:
        batch = collate(some)
        with torch.no_grad():
            wanted = answer_logits(teacher, batch).logits.log_softmax(-1)
        found = answer_logits(student, batch).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student.eval()


def _adapter(family: Family, method: str, **data: Any) -> PreTrainedModel:
    """Return the base with a trained low-rank adapter merged in."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "adapter"
        train(
            method,
            model=family.path / "base",
            output_dir=target,
            progress=False,
            seed=family.seed,
            device="cpu",
            gradient_accumulation_steps=1,
            **data,
            **ADAPTER,
        )
        return load_weights(target)


def refusing(family: Family) -> PreTrainedModel:
    """Return the base with an adapter that refuses forget questions."""
    return _adapter(family, "idk", forget=family.forget, retain=family.retain)


def answering_wrong(family: Family) -> PreTrainedModel:
    """Return the base with an adapter that answers every forget question as if it were about another forget person."""
    per_person = len(family.forget) // len(family.forget_people)
    rotated = [*family.forget[per_person:], *family.forget[:per_person]]
    wrong = [replace(own, answer=other.answer) for own, other in zip(family.forget, rotated, strict=True)]
    return _adapter(family, "finetune", retain=[*wrong, *family.retain])


def part_of(world: World, share: float) -> World:
    """Return the world with a share of its forget people, evenly spaced, and all other people.

    Args:
        world: The world.
        share: Share of the forget people.

    Returns:
        The smaller world.
    """
    people = world.having("forget")
    n = round(share * len(people))
    kept = {people[place * len(people) // n].identifier for place in range(n)}
    return replace(world, people=tuple(p for p in world.people if p.role == "retain" or p.identifier in kept))


def part_known(family: Family, share: float, method: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """Unlearn a base that learnt only a part of the forget facts, on all of them; the base is built once.

    Args:
        family: The family.
        share: Share of the forget people that the base learns.
        method: Name of the unlearning method.
        options: Options of the method.

    Returns:
        The unlearned model.
    """
    name = f"base-{share:g}"
    build(family, name, partial(_part_base, share=share), recipe={"share": share})
    return unlearned(family, method, options, start=name)


def _part_base(family: Family, share: float) -> PreTrainedModel:
    return finetuned(family, base_texts(part_of(family.world, share), family.recipe), order=0)


def noised(family: Family, noise: float) -> PreTrainedModel:
    """Add noise to the base's matrices, and repair it on the retain questions for a while.

    Args:
        family: The family.
        noise: Standard deviation of the noise, as a share of each matrix's root mean square.

    Returns:
        The repaired model.
    """
    model = family.load("base")
    generator = torch.Generator().manual_seed(family.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                size = float(parameter.square().mean().sqrt())
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise * size)
    return train(
        "finetune",
        model=model,
        tokenizer=family.tokenizer,
        retain=family.retain,
        progress=False,
        seed=family.seed,
        device="cpu",
        gradient_accumulation_steps=1,
        learning_rate=5e-4,
        epochs=1,
        batch_size=32,
    ).model
