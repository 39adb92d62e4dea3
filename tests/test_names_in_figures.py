"""No name of a user, a model or a file is read as markup by plotly, whichever figure shows it."""

import html
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import analyses
import dissect
from analyses.npo_synthetic.figures import FAMILIES
from analyses.tradeoff.report import QUALITY, UTILITY
from analyses.verdict_benchmark.constructions import NEVER_KNEW
from dissect.plotting import literal

EVIL = '<b>Oslo</b><br> &amp; <a href="https://evil">x</a> %{evil} $evil$ \u202e\x1b'
"""What a prompt, a group, a model's directory or a table of somebody else may hold."""


def numbers(**columns: Any) -> dict[str, Any]:
    """Return columns of a value, its interval and its n under every name that a figure asks for."""
    names = ("krs", "difference", "share", "direct_centred", "relative_change", "cosine", "logprob", "auroc", "found")
    names += ("score", "value", "rho", "mean", "even", "kl_own")
    ends = {f"{name}{end}": 0.5 for name in names for end in ("", "_low", "_high")}
    return ends | {"low": 0.4, "high": 0.6, "n": 3} | columns


def table(*rows: dict[str, Any]) -> pd.DataFrame:
    """Return a table of such rows."""
    return pd.DataFrame([numbers(**row) for row in rows])


def sweep(**columns: Any) -> pd.DataFrame:
    """Return a curve of patch: a sweep of layers and a single window, both with hostile names."""
    layers = [{"window": "1", "centre": layer, "first_layer": layer, "last_layer": layer} for layer in range(3)]
    single = [{"window": kind, "centre": 0, "first_layer": 0, "last_layer": 2} for kind in (EVIL, "all")]
    arms = [{"arm": "main", "donor": "base"}, {"arm": "donor", "donor": EVIL}, {"arm": EVIL, "donor": "base"}]
    common = {"site": EVIL, "example": EVIL, "example_index": 0} | columns
    return table(*({**common, **arm, **place} for arm in arms for place in layers + single))


def one_window() -> pd.DataFrame:
    """Return a curve of patch with single layers only."""
    return sweep(window="1").drop_duplicates(["centre", "arm"])


def decomposed() -> pd.DataFrame:
    """Return a curve of decompose."""
    terms = ("weight", "coefficient", "interaction", "total")
    places = [{"first_layer": low, "last_layer": high} for low, high in ((0, 0), (1, 1), (0, 1))]
    return table(*({"site": "mlp_out", "arm": "main", "term": term, **place} for term in terms for place in places))


def of_targets(*rows: dict[str, Any]) -> pd.DataFrame:
    """Return a table of probe."""
    return table(
        *({"target": target, "prompts": "forget", **row} for target in ("unlearned", "control") for row in rows)
    )


def evidence() -> pd.DataFrame:
    """Return a verdict's evidence."""
    texts = {"test": EVIL, "claim": EVIL, "variant": EVIL, "measure": EVIL}
    return table({"level": 0, "against": "control", **texts})


def steps() -> pd.DataFrame:
    """Return the steps of runs of the analysis of trade-offs."""
    run = {"split": EVIL, "name": EVIL, "seed": 0}
    return pd.DataFrame([{**run, "step": step, QUALITY: 0.1, UTILITY: 0.2} for step in range(2)])


def judged() -> pd.DataFrame:
    """Return judged models of the benchmark of verdicts."""
    model = {"made": NEVER_KNEW, "collapsed": False, "kind": "erased", EVIL: 0.5}
    return pd.DataFrame([model | {"family": EVIL, "model": EVIL, "score": 0.5}])


def synthetic() -> pd.DataFrame:
    """Return runs of the synthetic experiment, one of an unknown method, and gradient ascent under a hostile name."""
    methods = [*(name for names in FAMILIES.values() for name in names), EVIL]
    values = {"forget_distance": 1.0, "retain_distance": 1.0, "seed": 0, "alpha": 1.0}
    return pd.DataFrame([values | {"method": name, "step": step} for name in methods for step in (0, 1, 2)])


def powers() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs over betas of the synthetic experiment, and the powers fitted to them."""
    names = [(EVIL, np.nan), ("NPO", 0.1)]
    runs = [
        {"method": name, "beta": beta, "seed": 0, "step": step, "forget_kl": float(step), "retain_distance": 1.0}
        for name, beta in names
        for step in range(1, 4)
    ]
    fits = [
        numbers(method=name, beta=beta, metric="forget_kl", quantity="rate_power", first_step=EVIL, last_step=EVIL)
        for name, beta in names
    ]
    return pd.DataFrame(runs), pd.DataFrame(fits)


def scale() -> SimpleNamespace:
    """Return one scale of spike-ins."""
    estimate = SimpleNamespace(value=0.5, low=0.4, high=0.6, n=3)
    return SimpleNamespace(attack=EVIL, zero=estimate, ceiling=estimate, user=estimate)


RULE = SimpleNamespace(reference={EVIL: [0.1, 0.2]}, suppressed_above=0.4, margin=0.1)
MEANS = [{"model": model, "metric": name, "set": EVIL} for model in ("base", "control") for name in ("bleu", "kl")]
CHANGES = [{"set": EVIL, "target": target, "layer": layer} for target in ("unlearned", "control") for layer in (0, 1)]


def recovered() -> pd.DataFrame:
    """Return the models of a world, its control among them."""
    steps = {"world": EVIL, "same_facts": 2.0, "other_facts": 4.0}
    return table(*({"method": method, **steps} for method in ("control", EVIL)))


FIGURES: dict[str, Callable[[Any], go.Figure]] = {
    "dissect.sweeps.figures.recovery_figure": lambda draw: draw(sweep(), title=EVIL, legend=EVIL),
    "dissect.sweeps.figures.difference_figure": lambda draw: draw(sweep(), title=EVIL, legend=EVIL),
    "dissect.sweeps.figures.comparison_figure": lambda draw: draw({EVIL: one_window()}, title=EVIL),
    "dissect.sweeps.figures.example_heatmap": lambda draw: draw(
        sweep(window="1").drop_duplicates(["centre", "arm"]), title=EVIL
    ),
    "dissect.decomposition.figures.krs_figure": lambda draw: draw(decomposed(), title=EVIL),
    "dissect.decomposition.figures.shares_figure": lambda draw: draw(decomposed(), title=EVIL),
    "dissect.decomposition.figures.direct_figure": lambda draw: draw(decomposed(), title=EVIL),
    "dissect.behaviour.figures.means_figure": lambda draw: draw(table(*MEANS), title=EVIL),
    "dissect.behaviour.figures.coefficient_figure": lambda draw: draw(table(*CHANGES), title=EVIL),
    "dissect.coefficients.figures.layers_figure": lambda draw: draw(
        of_targets({"layer": 0}), of_targets({"last_layers": 1}), title=EVIL
    ),
    "dissect.coefficients.figures.neurons_figure": lambda draw: draw(
        of_targets({"selection": "top", "k": 8}), title=EVIL
    ),
    "dissect.coefficients.figures.scaling_figure": lambda draw: draw(of_targets({"factor": 1.0}), title=EVIL),
    "dissect.verdicts.figures.evidence_figure": lambda draw: draw(evidence(), title=EVIL),
    "dissect.verdicts.figures.standing_figure": lambda draw: draw(
        SimpleNamespace(value=0.5, low=0.4, high=0.6), RULE, label=EVIL
    ),
    "dissect.stress.spike_ins.figures.spike_ins_figure": lambda draw: draw([scale()]),
    "analyses.tradeoff.figures.tradeoff_figure": lambda draw: draw(
        steps(), control_utility={EVIL: 0.8}, title=EVIL, titles={EVIL: EVIL}
    ),
    "analyses.resistance.figures.resistance_figure": lambda draw: draw(recovered(), most_steps=32),
    "analyses.verdict_benchmark.figures.scores_figure": lambda draw: draw(judged(), RULE, numbers=("score", EVIL)),
    "analyses.verdict_benchmark.figures.rates_figure": lambda draw: draw(table({"number": EVIL})),
    "analyses.verdict_benchmark.figures.shares_figure": lambda draw: draw(table({"hidden by": EVIL, "share": 0.5})),
    "analyses.npo_synthetic.figures.distance_figure": lambda draw: draw(synthetic(), 1.0),
    "analyses.npo_synthetic.figures.tradeoff_figure": lambda draw: draw(
        synthetic()[lambda runs: runs["method"] != EVIL]
    ),
    "analyses.npo_synthetic.figures.limit_figure": lambda draw: draw(powers()[0]),
    "analyses.npo_synthetic.figures.growth_figure": lambda draw: draw(*powers()),
    "analyses.muse_runs.report.figure": lambda draw: draw(
        table({"kind": "scal", "metric": "forget_verbmem", "documents": 1, "number": 1}), EVIL
    ),
    "analyses.unlearning_methods.figure": lambda draw: draw(
        pd.DataFrame([{"model": EVIL, "asked": asked, "rouge": 0.5} for asked in ("forget", "retain")]), EVIL
    ),
}
"""Every function that draws, called with hostile names wherever a name comes in."""

NO_NAMES = {"analyses.npo_synthetic.figures.tradeoff_figure"}
"""Figures whose texts are all this project's own."""

OWN_TAGS = ("<br>", "<sub>", "</sub>", "<sup>", "</sup>", "<extra>", "</extra>")


def texts(value: Any, key: str = "") -> Iterator[str]:
    """Yield every text of a figure that plotly shows."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in ("template", "legendgroup", "fillcolor"):
                yield from texts(item, name)
    elif isinstance(value, list | tuple | np.ndarray):
        for item in value:
            yield from texts(item, key)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("name", FIGURES)
def test_no_name_in_a_figure_is_markup(name: str) -> None:
    module, _, function = name.rpartition(".")
    figure = FIGURES[name](getattr(importlib.import_module(module), function))
    shown = list(texts(figure.to_plotly_json()))
    for text in shown:
        for tag in OWN_TAGS:
            text = text.replace(tag, "")
        for sign in ("<", "%{evil", "$", "\u202e", "\x1b", "&amp; "):
            assert sign not in text, text
    assert name in NO_NAMES or any(literal(EVIL) in text for text in shown)


def test_every_function_that_draws_is_tried() -> None:
    found = set()
    for package in (dissect, analyses):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith((".figures", ".report", "unlearning_methods")):
                for name, function in inspect.getmembers(importlib.import_module(module.name), inspect.isfunction):
                    drawn = str(inspect.signature(function).return_annotation)
                    if function.__module__ == module.name and not name.startswith("_") and "Figure" in drawn:
                        found.add(f"{module.name}.{name}")
    found -= {"analyses.npo_synthetic.figures.figures"}  # calls the others
    assert found == set(FIGURES)


def test_a_literal_text_is_what_plotly_shows_again() -> None:
    for text in ("", "Oslo", "a < b > c", "&lt;", "&amp;", "%{x}", "50 %", "{x}", "$5", "a\nb", "Ünï – 漢字"):
        assert html.unescape(literal(text)) == text
    assert literal("Oslo (3)") == "Oslo (3)"
