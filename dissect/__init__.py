"""Decide whether knowledge was erased from a language model's parameters or merely suppressed.

A pair of models, before and after unlearning, is loaded once and then passed to the experiments:

    from dissect import load_pair, load_prompts, patch, verdict

    pair = load_pair("demo:base", "demo:npo")
    prompts = load_prompts("questions.json", pair.tokenizer)
    result = patch(pair, prompts, sites=["mlp_coef", "attn_out", "mlp_coef+attn_out"], window=5)
    result.curve()      # mean KRS with interval per site and centre
    result.figure().show()
    verdict(pair, prompts, budget="quick").label

Experiments: `patch` (activations), `restore` (weights), `decompose` (weight and coefficient parts of a change), `probe`
(single MLP coefficients), `behave` (generations and probabilities), `verdict` (a battery of stress tests). Each returns
a result with tables, intervals and figures; `load_result` (patch and restore), `load_decompose`, `load_probe`,
`load_behave` and `load_verdict` read a finished run directory.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dissect.behaviour.result import BehaviourResult, load_behave
    from dissect.behaviour.run import behave
    from dissect.coefficients.result import ProbeResult, load_probe
    from dissect.coefficients.run import probe
    from dissect.decomposition.result import DecompositionResult, load_decompose
    from dissect.decomposition.run import decompose
    from dissect.models.model import Model, load_model
    from dissect.models.pair import ModelPair, load_pair
    from dissect.prompts.loading import load_prompts
    from dissect.prompts.prompts import Prompts
    from dissect.sweeps.patching import patch
    from dissect.sweeps.restoration import restore
    from dissect.sweeps.result import SweepResult, load_result
    from dissect.verdicts.result import Verdict, load_verdict
    from dissect.verdicts.run import verdict
    from unlearning.common.errors import InputError

_HOME = {
    "BehaviourResult": "dissect.behaviour.result",
    "DecompositionResult": "dissect.decomposition.result",
    "InputError": "unlearning.common.errors",
    "Model": "dissect.models.model",
    "ModelPair": "dissect.models.pair",
    "ProbeResult": "dissect.coefficients.result",
    "Prompts": "dissect.prompts.prompts",
    "SweepResult": "dissect.sweeps.result",
    "Verdict": "dissect.verdicts.result",
    "behave": "dissect.behaviour.run",
    "decompose": "dissect.decomposition.run",
    "load_behave": "dissect.behaviour.result",
    "load_decompose": "dissect.decomposition.result",
    "load_model": "dissect.models.model",
    "load_pair": "dissect.models.pair",
    "load_probe": "dissect.coefficients.result",
    "load_prompts": "dissect.prompts.loading",
    "load_result": "dissect.sweeps.result",
    "load_verdict": "dissect.verdicts.result",
    "patch": "dissect.sweeps.patching",
    "probe": "dissect.coefficients.run",
    "restore": "dissect.sweeps.restoration",
    "verdict": "dissect.verdicts.run",
}

__all__ = [
    "BehaviourResult",
    "DecompositionResult",
    "InputError",
    "Model",
    "ModelPair",
    "ProbeResult",
    "Prompts",
    "SweepResult",
    "Verdict",
    "behave",
    "decompose",
    "load_behave",
    "load_decompose",
    "load_model",
    "load_pair",
    "load_probe",
    "load_prompts",
    "load_result",
    "load_verdict",
    "patch",
    "probe",
    "restore",
    "verdict",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `dissect --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
