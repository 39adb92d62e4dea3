"""The bases that the defaults are tried on, with what is to go and what is to stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analyses import unlearning_methods
from dissect.zoo import QUESTIONS, question_set
from unlearning import Example, read_examples
from unlearning.checkpoints.load import load_tokenizer, load_weights
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.common.errors import InputError
from unlearning.data.encoding import encode
from unlearning.evaluation.answers import answer_likelihoods

FACTS = Path(__file__).parent / "facts.jsonl"
"""Capitals, chemical symbols and opposites, which a language model may know."""

KNOWN = 0.3
"""Probability from which a language model counts as knowing a fact."""


@dataclass(frozen=True)
class World:
    """A base and its data.

    Attributes:
        name: Name for tables and directories.
        base: Directory, hub id or built-in name of the base.
        forget, retain: What is to go, and what is to stay.
        options: Options that describe the data, not the training, such as how an answer ends.
        own: Options that single methods cannot do without, by method.
    """

    name: str
    base: str
    forget: Sequence[Example]
    retain: Sequence[Example]
    options: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def demo_world() -> World:
    """Return the built-in world: the questions on the forget people, and those on everybody else."""
    return World(
        name="demo",
        base="demo:base",
        forget=read_examples(question_set("forget")),
        retain=read_examples(question_set("retain")),
        own={
            "whp": {"anchors": str(QUESTIONS / "anchors.json")},
            "oracle": {"control": "demo:never"},
            "elm": {"concept": "the people"},
        },
    )


def tofu_world(directory: Path) -> World:
    """Return the pair that `analyses.tofu_pair` has built.

    Args:
        directory: Its output.

    Returns:
        The base and its data.

    Raises:
        InputError: The models or the data are missing.
    """
    pair = unlearning_methods.tofu_world(directory)
    sets = {name: read_examples(str(directory / "data" / f"{name}.jsonl")) for name in ("forget", "retain")}
    own = {"oracle": {"control": pair.control}, "elm": {"concept": "the authors"}}
    return World(name="tofu", base=pair.base, forget=sets["forget"], retain=sets["retain"], own=own)


def language_model_world(name: str, *, n_forget: int = 24) -> World:
    """Return a language model with facts that it knows: half of the capitals go, everything else stays.

    Args:
        name: Directory, hub id or built-in name of the model.
        n_forget: Largest number of capitals to forget.

    Returns:
        The model and its facts. Their answers end in the middle of a sentence, so no end of sequence is trained.

    Raises:
        InputError: The model knows fewer than 8 capitals.
    """
    path = locate_checkpoint(name)
    model, tokenizer = load_weights(path), load_tokenizer(path)
    facts = read_examples(str(FACTS))
    spans = encode(tokenizer, facts, append_eos=False, max_length=None).spans
    known = [
        fact
        for fact, span in zip(facts, spans, strict=True)
        if answer_likelihoods(model, [span], batch_size=1)["probability"] > KNOWN
    ]
    capitals = [fact for fact in known if fact.prompt.startswith("The capital of")]
    if len(capitals) < 8:
        raise InputError(f"`model` must know 8 capitals to forget some, got {name}, which knows {len(capitals)}")
    forget = capitals[::2][:n_forget]
    retain = [fact for fact in known if fact not in forget]
    own = {"elm": {"concept": "the capitals of countries"}}
    return World(name=path.name, base=name, forget=forget, retain=retain, options={"append_eos": False}, own=own)
