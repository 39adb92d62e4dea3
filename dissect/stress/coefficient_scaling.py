"""Scale what the unlearned model's own last layers write, and test whether the answers come back.

    m <- f m    in the last layers, with m the MLP coefficients, the MLP's output or the attention's output

f = 0 removes a part, f > 1 amplifies it. Nothing comes from the base, so whatever comes back was in the model: if a
last layer only overwrites the answer, removing that layer reveals the answer.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.stress.core.case import Case, spread
from dissect.stress.core.edits import inputs_edited, outputs_edited, remembered_scores, remembering
from dissect.stress.core.result import PLAIN, StressResult, fact_rows
from dissect.stress.core.scores import FactScores, score_facts
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress

Site = Literal["mlp_coef", "mlp_out", "attn_out"]

FACTORS = (0.0, 0.5, 1.5, 2.0)

PROVES = (
    "rho > 0: answers come back when the outputs of the unlearned model's own last layers are scaled, so the model "
    "held them all along. rho = 0: the last layers do not merely overwrite them."
)


def coefficient_scaling(
    case: Case,
    *,
    sites: Sequence[Site] = ("mlp_coef", "attn_out"),
    last: Sequence[int] = (1, 3),
    factors: Sequence[float] = FACTORS,
    skipped: int = 3,
    limit: int = 40,
) -> StressResult:
    """Scale the coefficients and outputs of the last layers, and remove single MLPs.

    Variants: every site in the last k layers times every factor, such as `mlp_coef of the last 3 layers x 0.5`, and
        each of
    the last layers' first site removed by itself.

    Args:
        case: Models and facts; every model's own values are scaled.
        sites: Sites to scale: `mlp_coef`, `mlp_out` (differs if the down projection has a bias), `attn_out`.
        last: Numbers of layers, counted from the end; all layers if the model has fewer.
        factors: Factors to multiply by.
        skipped: Number of last layers that are removed singly.
        limit: Use at most this many facts.

    Returns:
        The result of the test `coefficient_scaling`.

    Raises:
        InputError: A site is unknown or missing in the architecture, or a number of layers is below 1.
    """
    clock = time.monotonic()
    if not last or min(last) < 1 or skipped < 0 or not factors:
        raise InputError("`factors` must not be empty, `last` must be numbers from 1, and `skipped` must be at least 0")
    n_layers = case.pair.n_layers
    for model in case.models.values():
        for site in sites:
            _module(model, site, n_layers - 1)  # raises for a missing site before anything is computed
    facts = spread(case.forget, limit)
    variants = _variants(sites, last, factors, skipped, n_layers)
    rows: list[tuple[str, str, FactScores]] = []
    with Progress(len(case.models) * (len(variants) + 1), "scaling coefficients", show=case.progress) as bar:
        for role, model in case.models.items():
            first = min(min(layers) for _, layers, _ in variants.values())
            plain, memory = remembered_scores(model, facts, first, batch_size=case.batch_size)
            rows.append((role, PLAIN, plain))
            bar.advance(1)
            for name, (site, layers, factor) in variants.items():
                with scaled(model, site, layers, factor), remembering(model, first, memory):
                    rows.append((role, name, score_facts(model, facts, batch_size=case.batch_size)))
                bar.advance(1)
    return StressResult(
        test="coefficient_scaling",
        level=3,
        measure="rank",
        frame=fact_rows(facts, rows),
        proves=PROVES,
        settings={
            "sites": list(sites),
            "last": list(last),
            "factors": list(factors),
            "skipped": skipped,
            "n_facts": len(facts),
        },
        seconds=time.monotonic() - clock,
        seed=case.seed,
    )


def _variants(
    sites: Sequence[Site], last: Sequence[int], factors: Sequence[float], skipped: int, n_layers: int
) -> dict[str, tuple[Site, range, float]]:
    """Return site, layers and factor of every variant by its name."""
    found: dict[str, tuple[Site, range, float]] = {}
    for site in sites:
        for count in dict.fromkeys(min(number, n_layers) for number in last):
            which = "the last layer" if count == 1 else f"the last {count} layers"
            for factor in factors:
                found[f"{site} of {which} x {factor:g}"] = (site, range(n_layers - count, n_layers), factor)
    known = {(site, layers, factor) for site, layers, factor in found.values()}
    for layer in range(n_layers - 1, max(-1, n_layers - 1 - skipped), -1):
        alone = (sites[0], range(layer, layer + 1), 0.0)
        if alone not in known:
            found[f"{sites[0]} of layer {layer} x 0"] = alone
    return found


@contextmanager
def scaled(model: Model, site: Site, layers: Sequence[int], factor: float) -> Iterator[None]:
    """Multiply the values of a site by a factor, in these layers and at every token position.

    Args:
        model: A model in memory.
        site: One of `mlp_coef`, `mlp_out` and `attn_out`.
        layers: The layers.
        factor: The factor.

    Yields:
        Nothing; the scaling ends when the context is closed.

    Raises:
        InputError: The site is unknown, or the model does not have it.
    """

    def edit(values: Tensor) -> Tensor:
        return values * factor

    modules = [_module(model, site, layer) for layer in layers]
    with inputs_edited(modules, edit) if site == "mlp_coef" else outputs_edited(dict.fromkeys(modules, edit)):
        yield


def _module(model: Model, site: Site, layer: int) -> nn.Module:
    """Return the module whose input (`mlp_coef`) or output is scaled.

    Raises:
        InputError: The site is unknown, or the model does not have it.
    """
    block = block_of(model.hf, model.anatomy, layer)
    modules = {"mlp_coef": block.down_proj, "mlp_out": block.mlp, "attn_out": block.attn}
    if site not in modules:
        raise InputError(f"`sites` must be some of {', '.join(modules)}, got {site}")
    module = modules[site]
    if module is None:
        raise InputError(f"{model.name} has no site {site}: its blocks have no module for it. Give other `sites`")
    return module
