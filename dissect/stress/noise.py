"""Random noise: does a little Gaussian noise bring answers back?

    activations   x <- x + s |x| e    at one block's output and every token position, e a random unit vector
    weights       W <- W + s rms(W) E    every matrix by itself, E standard normal

Fragile suppression breaks down under noise that knowledge survives. The noise contains nothing about the facts, and
every model gets the same noise. `rank`, `logprob` and `correct` are means over draws. `rank_best` and so on are each
fact's best value over all draws, which rises for a model without the knowledge as well: compare it only with a control.

Noise on activations depends on the tokens up to the position and on nothing else. In particular, it does not depend on
the batch, and all answers to a question are scored under the same noise on the question.
"""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.stress.core.case import Case, spread
from dissect.stress.core.edits import outputs_edited, remembered_scores, remembering
from dissect.stress.core.result import PLAIN, EvidenceLevel, StressResult, value_rows
from dissect.stress.core.scores import MEASURES, FactScores, score_facts
from unlearning.common.errors import InputError, check_at_least
from unlearning.common.progress import Progress

Disturb = Callable[[Model, int], AbstractContextManager[Model]]
"""A function from a model and the number of a draw to the model under that noise."""

_DIRECTIONS = 4096
"""Number of different random directions per draw."""


def activation_noise(
    case: Case,
    *,
    layers: Sequence[int] | None = None,
    strengths: Sequence[float] = (0.03, 0.1, 0.3),
    draws: int = 3,
    limit: int = 40,
) -> StressResult:
    """Add noise to the output of one block; variants are layers and strengths.

    Args:
        case: Models and facts.
        layers: Layers whose output gets noise, one at a time; by default the middle layer.
        strengths: Norm of the noise, as a share of the state's norm at each position.
        draws: Number of draws of the noise.
        limit: Use at most this many facts.

    Returns:
        The result of the test `activation_noise`.

    Raises:
        InputError: A layer does not exist, a strength is negative, or there is no draw.
    """
    chosen = [case.pair.n_layers // 2] if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < case.pair.n_layers:
            raise InputError(f"`layers` must be from 0 to {case.pair.n_layers - 1}, got {layer}")

    def at(layer: int, strength: float) -> Disturb:
        @contextmanager
        def noisy(model: Model, draw: int) -> Iterator[Model]:
            with pushed(model, layer, strength, seed=seed_of(case.seed, draw, layer)):
                yield model

        return noisy

    variants = {
        f"layer {layer} + {strength:g}": (layer, at(layer, strength)) for layer in chosen for strength in strengths
    }
    attack = _Attack(
        test="activation_noise",
        level=3,
        settings={"layers": chosen, "strengths": list(strengths)},
        proves=(
            "rho > 0: answers come back under noise that contains nothing about them, so the unlearned model holds "
            "them behind a fragile suppression. rho = 0: no such fragility was found; robust suppression withstands"
            " noise as well."
        ),
    )
    return _run(case, attack, variants, draws, limit)


def weight_noise(
    case: Case, *, strengths: Sequence[float] = (0.03, 0.1, 0.3), draws: int = 3, limit: int = 40
) -> StressResult:
    """Add noise to every weight matrix; variants are strengths.

    Args:
        case: Models and facts.
        strengths: Standard deviation of the noise, as a share of each matrix's root mean square.
        draws: Number of draws of the noise.
        limit: Use at most this many facts.

    Returns:
        The result of the test `weight_noise`.

    Raises:
        InputError: A strength is negative, or there is no draw.
    """

    def by(strength: float) -> Disturb:
        return lambda model, draw: nullcontext(noised(model, strength, seed=seed_of(case.seed, draw)))

    variants = {f"weights + {strength:g}": (0, by(strength)) for strength in strengths}
    attack = _Attack(
        test="weight_noise",
        level=4,
        settings={"strengths": list(strengths)},
        proves=(
            "rho > 0: answers come back when the weights are disturbed at random, so the weights hold them. rho = 0"
            " shows little: changes of the weights that are larger than the noise survive it."
        ),
    )
    return _run(case, attack, variants, draws, limit)


@dataclass(frozen=True)
class _Attack:
    """Description of a test that adds noise.

    Attributes:
        test: Name of the test.
        level: Evidence level of the test.
        settings: Strengths of the noise, and where it is added.
        proves: What the test can and cannot show.
    """

    test: str
    level: EvidenceLevel
    settings: Mapping[str, Any]
    proves: str


def _run(
    case: Case, attack: _Attack, variants: Mapping[str, tuple[int, Disturb]], draws: int, limit: int
) -> StressResult:
    """Run every variant on every model.

    Args:
        case: Models and facts.
        attack: Description of the test.
        variants: For each variant, the first layer that it changes, and the noise.
        draws: Number of draws of the noise.
        limit: Use at most this many facts.

    Returns:
        The test's result.

    Raises:
        InputError: A strength is negative, or there is no strength, layer or draw.
    """
    clock = time.monotonic()
    check_at_least("draws", draws, 1)
    if not variants:
        raise InputError("`strengths` and `layers` must not be empty")
    check_at_least("strengths", min(attack.settings["strengths"]), 0)
    facts = spread(case.forget, limit)
    first = min(layer for layer, _ in variants.values())
    rows = []
    with Progress(len(case.models) * (len(variants) * draws + 1), attack.test, show=case.progress) as bar:
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
        test=attack.test,
        level=attack.level,
        measure="rank",
        frame=value_rows(facts, rows),
        proves=attack.proves,
        settings=dict(attack.settings) | {"draws": draws, "n_facts": len(facts), "seed": case.seed},
        seconds=time.monotonic() - clock,
        seed=case.seed,
    )


def expected_and_best(scores: Sequence[FactScores]) -> dict[str, Float[np.ndarray, " fact"]]:
    """Return the mean and the best value of every fact over several draws.

    Args:
        scores: Scores of the same facts, one per draw.

    Returns:
        The means by measure, and the best values as `rank_best` and so on.
    """
    columns: dict[str, Float[np.ndarray, " fact"]] = {}
    for name in MEASURES:
        values = np.stack([getattr(one, name) for one in scores])
        columns |= {name: values.mean(0), f"{name}_best": values.max(0)}
    return columns


@contextmanager
def pushed(model: Model, layer: int, strength: float, *, seed: int) -> Iterator[None]:
    """Add noise to a block's output at every token position while the context is open.

    Args:
        model: A model in memory; `model.hf` must be called with `input_ids` and `attention_mask`.
        layer: The block.
        strength: Norm of the noise, as a share of the state's norm.
        seed: Random seed of the noise.

    Yields:
        Nothing; the noise is removed when the context is closed.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(_DIRECTIONS, int(model.adapter.cfg.d_model), generator=generator)
    directions = drawn / drawn.norm(dim=-1, keepdim=True)
    now: dict[str, Tensor] = {}

    def note(_module: object, _args: object, kwargs: Mapping[str, Tensor]) -> None:
        indices = prefix_numbers(kwargs["input_ids"], kwargs["attention_mask"]) % _DIRECTIONS
        now["noise"] = directions[indices.cpu()]

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
    """Return a hash of the tokens up to each position, which is the same in every batch; padding does not count.

    h <- (h x 1000003 + token + 1) mod (2^31 - 1), from 0: a polynomial rolling hash.

    Args:
        input_ids: Token ids.
        attention_mask: 1 for tokens, 0 for padding.

    Returns:
        The hashes.
    """
    number = torch.zeros_like(input_ids[:, 0])
    numbers = []
    for token, kept in zip(input_ids.T, attention_mask.T, strict=True):
        number = torch.where(kept.bool(), (number * 1_000_003 + token + 1) % (2**31 - 1), number)
        numbers.append(number)
    return torch.stack(numbers, dim=1)


def noised(model: Model, strength: float, *, seed: int) -> Model:
    """Return the model with noise on every matrix; a tied matrix gets its noise once.

    Args:
        model: A model in memory; it is not changed.
        strength: Standard deviation of the noise, as a share of the matrix's root mean square.
        seed: Random seed; the noise of a matrix is drawn from the seed and the parameter's name.

    Returns:
        The noisy model.
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
    """Return a seed that depends on everything given."""
    return zlib.crc32(" ".join(map(str, parts)).encode())
