"""Fluency by a text classifier: the probability that a text is clean, according to a published gibberish detector."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearning.checkpoints.load import without_bars
from unlearning.checkpoints.locate import locate_checkpoint
from unlearning.common.errors import InputError, nearest


@dataclass(frozen=True)
class Classifier:
    """A classifier that tells clean texts from gibberish.

    Attributes:
        probabilities: Returns the probability of being clean for each text.
        identity: Plain data that the probabilities depend on, such as a hash of the weights.
    """

    probabilities: Callable[[Sequence[str]], list[float]]
    identity: dict[str, Any]


def load_classifier(
    name: str | Path, *, label: str | None = None, max_length: int = 32, batch_size: int = 16, device: str = "cpu"
) -> Classifier:
    """Load a sequence classifier of transformers, by directory or hub id.

    The published fluency is the softmax probability of class 0 ("clean") of
    madhurjindal/autonlp-Gibberish-Detector-492513457 on generations cut to 32 (TOFU) or 512 tokens (MUSE) (2506.12618).

    Args:
        name: Directory or hub id of the classifier; weights are read from safetensors.
        label: Class of clean texts; None for class 0.
        max_length: Number of tokens of a text that the classifier reads.
        batch_size: Number of texts at a time; no probability depends on it.
        device: Device of the classifier.

    Returns:
        The classifier.

    Raises:
        InputError: There is no such classifier, it cannot be loaded, or it has no such class.
    """
    from transformers import pipeline

    path = locate_checkpoint(name)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"`classifier` must have safetensors weights, got {name}. Name a text classifier saved by transformers."
        )
    try:
        with without_bars():
            classify: Any = pipeline(
                "text-classification", model=str(path), device=device, model_kwargs={"dtype": "float32"}
            )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"`classifier` {name} cannot be loaded as a text classifier: {reason}") from None
    labels = {int(place): str(text) for place, text in classify.model.config.id2label.items()}
    clean = labels[0] if label is None else label
    if clean not in labels.values():
        raise InputError(
            f"`clean_label` must be one of {', '.join(labels.values())}, got {clean!r}{nearest(clean, labels.values())}"
        )

    def probabilities(texts: Sequence[str]) -> list[float]:
        found = classify(
            list(texts),
            top_k=None,
            function_to_apply="softmax",
            truncation=True,
            max_length=max_length,
            batch_size=batch_size,
        )
        return [next(float(one["score"]) for one in scores if one["label"] == clean) for scores in found]

    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return Classifier(
        probabilities, {"classifier_sha256": digest.hexdigest(), "clean_label": clean, "max_length": max_length}
    )
