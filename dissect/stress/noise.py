"""Random pushes: does a little Gaussian noise bring answers back?

    activations   x <- x + s |x| e    at one block's output and every token position, e a random unit vector
    weights       W <- W + s rms(W) E    every matrix by itself, E standard normal

Fragile suppression gives way to noise that knowledge survives. Nothing about the facts is put in, and every model gets
the same noise. `rank`, `logprob` and `correct` are expected values (means over draws); `rank_best` and so on are each
fact's best of all draws, which a model that guesses raises as well: they say something beside a never model only.

Noise on activations depends on the tokens up to the position, and on nothing else: not on the batch, and answers to one
question are compared under the same noise on it.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.models.parameter_swap import with_values
from dissect.stress.core.case import Case, spread
from dissect.stress.core.edits import outputs_edited, remembered_scores, remembering
from dissect.stress.core.result import PLAIN, EvidenceLevel, StressResult, value_rows
from dissect.stress.core.scores import MEASURES, FactScores, score_facts
from unlearning.common.errors import InputError
from unlearning.common.progress import Progress

Disturb = Callable[[Model, int], AbstractContextManager[Model]]
"""A model and the number of a draw: the model with that noise on it."""

_DIRECTIONS = 4096
"""How many different random directions there are to a draw."""


def activation_noise(
    case: Case,
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = (0.03, 0.1, 0.3),
    draws: int = 3,
    limit: int = 40,
) -> StressResult:
    """Noise on what one block hands on; variants are layers and strengths.

    Args:
        case: models and facts.
        layers: at whose output, one at a time; by default the middle one's.
        strengths: norm of the noise, as a share of the state's own norm at each position.
        draws: of the noise.
        limit: most facts that are tested.

    Raises:
        InputError: a layer that the models do not have, a negative strength, no draw.
    """
    chosen = [case.pair.n_layers // 2] if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < case.pair.n_layers:
            raise InputError(f"noise at layer {layer}: the models have layers 0 to {case.pair.n_layers - 1}")

    def at(layer: int, strength: float) -> Disturb:
        @contextmanager
        def noisy(model: Model, draw: int) -> Iterator[Model]:
            with pushed(model, layer, strength, seed=seed_of(case.seed, draw, layer)):
                yield model

        return noisy

    variants = {
        f"layer {layer} + {strength:g}": (layer, at(layer, strength)) for layer in chosen for strength in strengths
    }
    return _run(
        case,
        "activation_noise",
        3,
        variants,
        draws,
        limit,
        settings={"layers": chosen, "strengths": list(strengths)},
        proves=(
            "Above zero: answers come back under noise that says nothing of them, so the unlearned model holds them "
            "behind something fragile. At zero: no such fragility was found; robust suppression withstands noise too."
        ),
    )


def weight_noise(
    case: Case, *, strengths: Sequence[float] = (0.03, 0.1, 0.3), draws: int = 3, limit: int = 40
) -> StressResult:
    """Noise on every matrix of weights; variants are strengths.

    Args:
        case: models and facts.
        strengths: standard deviation of the noise, as a share of each matrix' own root mean square.
        draws: of the noise.
        limit: most facts that are tested.

    Raises:
        InputError: a negative strength, no draw.
    """

    def by(strength: float) -> Disturb:
        return lambda model, draw: nullcontext(noised(model, strength, seed=seed_of(case.seed, draw)))

    return _run(
        case,
        "weight_noise",
        4,
        {f"weights + {strength:g}": (0, by(strength)) for strength in strengths},
        draws,
        limit,
        settings={"strengths": list(strengths)},
        proves=(
            "Above zero: answers come back when the weights are disturbed at random, so the weights hold them. At "
            "zero: little; changes of the weights that are larger than the noise survive it."
        ),
    )


def _run(
    case: Case,
    test: str,
    level: EvidenceLevel,
    variants: Mapping[str, tuple[int, Disturb]],
    draws: int,
    limit: int,
    *,
    settings: dict[str, Any],
    proves: str,
) -> StressResult:
    """Every variant on every model; beside what disturbs it stands the first layer that it disturbs."""
    clock = time.monotonic()
    if draws < 1 or not variants:
        raise InputError(f"{test}: give at least one strength and one draw")
    if min(settings["strengths"]) < 0:
        raise InputError(f"{test}: a strength of {min(settings['strengths']):g}; give shares from 0 on, as 0.1")
    facts = spread(case.forget, limit)
    first = min(layer for layer, _ in variants.values())
    rows = []
    with Progress(len(case.models) * (len(variants) * draws + 1), test, show=case.progress) as bar:
        for role, model in case.models.items():
            plain, memory = remembered_scores(model, facts, first, batch_size=case.batch_size)
            rows.append((role, PLAIN, expected_and_best([plain])))
            bar.advance(1)
            for name, (_, disturb) in variants.items():
                scores = []
                for draw in range(draws):
                    with disturb(model, draw) as noisy, remembering(noisy, first, memory):
                        scores.append(score_facts(noisy, facts, batch_size=case.batch_size))
                    bar.advance(1)
                rows.append((role, name, expected_and_best(scores)))
    return StressResult(
        test=test,
        level=level,
        measure="rank",
        frame=value_rows(facts, rows),
        proves=proves,
        settings=settings | {"draws": draws, "n_facts": len(facts), "seed": case.seed},
        seconds=time.monotonic() - clock,
        seed=case.seed,
    )


def expected_and_best(scores: Sequence[FactScores]) -> dict[str, Float[np.ndarray, " fact"]]:
    """Of several draws' scores of the same facts: each fact's mean by measure, and its best as `rank_best`..."""
    columns: dict[str, Float[np.ndarray, " fact"]] = {}
    for name in MEASURES:
        values = np.stack([getattr(one, name) for one in scores])
        columns |= {name: values.mean(0), f"{name}_best": values.max(0)}
    return columns


@contextmanager
def pushed(model: Model, layer: int, strength: float, *, seed: int) -> Iterator[None]:
    """Add noise to what a block hands on, at every token position, while the context is open.

    Args:
        model: in memory; `model.hf` is called with `input_ids` and `attention_mask`.
        layer: of the block.
        strength: norm of the noise, as a share of the state's.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(_DIRECTIONS, int(model.adapter.cfg.d_model), generator=generator)
    directions = drawn / drawn.norm(dim=-1, keepdim=True)
    now: dict[str, Tensor] = {}

    def note(_module: object, _args: object, kwargs: Mapping[str, Tensor]) -> None:
        places = prefix_numbers(kwargs["input_ids"], kwargs["attention_mask"]) % _DIRECTIONS
        now["noise"] = directions[places.cpu()]

    def push(states: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        return states + strength * states.norm(dim=-1, keepdim=True) * now["noise"].to(states)

    handle = model.hf.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with outputs_edited({block_of(model.hf, model.anatomy, layer).whole: push}):
            yield
    finally:
        handle.remove()


def prefix_numbers(
    input_ids: Int[Tensor, "batch position"], attention_mask: Int[Tensor, "batch position"]
) -> Int[Tensor, "batch position"]:
    """A number of the tokens up to each position, the same in every batch; padding does not count.

    h <- (h x 1000003 + token + 1) mod (2^31 - 1), from 0: a polynomial rolling hash.
    """
    number = torch.zeros_like(input_ids[:, 0])
    numbers = []
    for token, kept in zip(input_ids.T, attention_mask.T, strict=True):
        number = torch.where(kept.bool(), (number * 1_000_003 + token + 1) % (2**31 - 1), number)
        numbers.append(number)
    return torch.stack(numbers, dim=1)


def noised(model: Model, strength: float, *, seed: int) -> Model:
    """The model with noise on every matrix; a tied one is disturbed once.

    Args:
        model: in memory; it is not changed.
        strength: standard deviation of the noise, as a share of the matrix' root mean square.
        seed: of the noise, which is drawn from it and the parameter's name.
    """
    values: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, parameter in model.hf.named_parameters(remove_duplicate=False):
        if parameter.dim() < 2:
            continue
        if id(parameter) not in done:
            weight = parameter.data
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
            size = strength * weight.float().square().mean().sqrt()
            done[id(parameter)] = (weight.float() + size * drawn).to(weight.dtype)
        values[name] = done[id(parameter)]
    return replace(model, hf=with_values(model.hf, values), sha256=f"{model.sha256} + {strength:g} noise {seed}")


def seed_of(*parts: object) -> int:
    """A seed of its own for everything that is named."""
    return zlib.crc32(" ".join(map(str, parts)).encode())
