"""The bases that the study unlearns, with what is asked and taught."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyses.defaults import worlds
from dissect.zoo import question_set
from unlearning import Example


@dataclass(frozen=True)
class World:
    """A base, a control, and questions in files.

    Attributes:
        name: Name for tables and directories.
        base, control: Directories, hub ids or built-in names; no control where there is none.
        forget, retain: Files of questions.
        general: File of other questions, for the verdict; None for none.
        options: Options that describe the data, not the training.
        own: Options that single methods cannot do without, by method.
    """

    name: str
    base: str
    control: str | None
    forget: Path
    retain: Path
    general: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def demo_world() -> World:
    """Return the built-in world."""
    given = worlds.demo_world()
    return World(
        "demo",
        given.base,
        "demo:never",
        question_set("forget"),
        question_set("retain"),
        question_set("general"),
        own=given.own,
    )


def tofu_world(directory: Path) -> World:
    """Return the pair that `analyses.tofu_pair` has built in a directory."""
    given = worlds.tofu_world(directory)
    forget, retain = (directory / "data" / f"{name}.jsonl" for name in ("forget", "retain"))
    return World("tofu", given.base, given.own["oracle"]["control"], forget, retain, own=given.own)


def language_model_world(name: str, out: Path) -> World:
    """Return a language model that knows capitals; its questions are written to a directory.

    A control does not exist for it, so what its attacks find is compared with no model that never knew.
    """
    import json

    from unlearning.common.runs import write_bytes

    given = worlds.language_model_world(name)

    def written(examples: Sequence[Example], kind: str) -> Path:
        path = out / given.name / f"{kind}.jsonl"
        # One question, one group: the groups are what folds of relearning are made of.
        rows = [{"prompt": one.prompt, "answer": one.answer, "group": one.prompt} for one in examples]
        write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return path

    forget, retain = written(given.forget, "forget"), written(given.retain, "retain")
    return World(given.name, given.base, None, forget, retain, options=given.options)
