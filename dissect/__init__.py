"""Was the knowledge erased from a language model's parameters, or merely suppressed?

from dissect import load_pair, load_prompts, patch

pair = load_pair("demo:base", "demo:npo")
prompts = load_prompts("questions.json", pair.tokenizer)
result = patch(pair, prompts, sites=["mlp_coef", "attn_out", "mlp_coef+attn_out"], window=5)
result.figure().show()
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dissect.behaviour import behave
    from dissect.behaviour_result import BehaviourResult, load_behave
    from dissect.decomposition import decompose
    from dissect.decomposition_results import DecompositionResult, load_decompose
    from dissect.judging import verdict
    from dissect.pairs import Model, ModelPair, load_model, load_pair
    from dissect.patching import patch
    from dissect.probe_result import ProbeResult, load_probe
    from dissect.probing import probe
    from dissect.prompts import Prompts, load_prompts
    from dissect.restoration import restore
    from dissect.results import SweepResult, load_result
    from dissect.verdict_result import Verdict, load_verdict
    from unlearning.errors import InputError

_HOME = {
    "BehaviourResult": "dissect.behaviour_result",
    "DecompositionResult": "dissect.decomposition_results",
    "InputError": "unlearning.errors",
    "Model": "dissect.pairs",
    "ModelPair": "dissect.pairs",
    "ProbeResult": "dissect.probe_result",
    "SweepResult": "dissect.results",
    "Prompts": "dissect.prompts",
    "Verdict": "dissect.verdict_result",
    "behave": "dissect.behaviour",
    "decompose": "dissect.decomposition",
    "load_behave": "dissect.behaviour_result",
    "load_decompose": "dissect.decomposition_results",
    "load_model": "dissect.pairs",
    "load_pair": "dissect.pairs",
    "load_probe": "dissect.probe_result",
    "load_prompts": "dissect.prompts",
    "load_result": "dissect.results",
    "load_verdict": "dissect.verdict_result",
    "patch": "dissect.patching",
    "probe": "dissect.probing",
    "restore": "dissect.restoration",
    "verdict": "dissect.judging",
}

__all__ = [
    "BehaviourResult",
    "DecompositionResult",
    "InputError",
    "Model",
    "ModelPair",
    "ProbeResult",
    "SweepResult",
    "Prompts",
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
    # torch and transformer-lens take seconds to import; `dissect --help` needs neither.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
