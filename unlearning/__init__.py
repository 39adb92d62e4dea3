"""Train language models with unlearning methods and evaluate the result.

from unlearning import evaluate, list_methods, read_examples, train

result = train("npo", model="demo:base", forget=read_examples("forget.json"), retain=read_examples("retain.json"))
result.model, result.history
evaluate("quality", model="demo:npo", control="demo:never", prompts="forget.json").frame
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearning.common.errors import InputError
    from unlearning.data.question_answer import Example, read_examples
    from unlearning.evaluation.catalogue import list_benchmarks
    from unlearning.evaluation.evaluate import evaluate
    from unlearning.evaluation.harness import Evaluation
    from unlearning.methods.catalogue import list_methods
    from unlearning.training.train import TrainResult, train

_HOME = {
    "Evaluation": "unlearning.evaluation.harness",
    "Example": "unlearning.data.question_answer",
    "InputError": "unlearning.common.errors",
    "TrainResult": "unlearning.training.train",
    "evaluate": "unlearning.evaluation.evaluate",
    "list_benchmarks": "unlearning.evaluation.catalogue",
    "list_methods": "unlearning.methods.catalogue",
    "read_examples": "unlearning.data.question_answer",
    "train": "unlearning.training.train",
}

__all__ = [
    "Evaluation",
    "Example",
    "InputError",
    "TrainResult",
    "evaluate",
    "list_benchmarks",
    "list_methods",
    "read_examples",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `unlearn --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
