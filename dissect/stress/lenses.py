"""Lenses: predictions that a final norm and an output head make from the residual stream of every layer.

Logit lens:  p_l = softmax(W_U norm(h_l)),  with the model's own norm and head, and with the base's.
Tuned lens:  p_l = softmax(W_U norm(h_l + A_l h_l + b_l)),  with the base's norm and head. A_l and b_l start at zero,
are fitted on the base to its own output (KL) on texts without the forget facts, and are then applied to every model.

Answers are scored teacher-forced, as the model's output would be: by the mean log-probability of their tokens.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.recovery import per_example
from dissect.stress.core.case import Case
from dissect.stress.core.distractors import Facts
from dissect.stress.core.residual_stream import (
    Stream,
    even_batches,
    head_logits,
    mean_logprobs,
    residual_stream,
    states_at,
)
from dissect.stress.core.result import StressResult, value_rows
from dissect.stress.core.scores import RANK_FLOOR, ranks
from unlearning.common.errors import InputError

Values = dict[str, Float[np.ndarray, " fact"]]
"""Values of every fact, by measure."""

Reading = Callable[[Stream], Iterator[tuple[str, Float[Tensor, "scored vocab"]]]]
"""A function from the states of a batch to pairs of a lens' name (with its layer) and the logits under it."""

MEASURES = ("rank", "logprob", "top1", "reciprocal_rank", "oriented")

FLOORS = {"rank": RANK_FLOOR, "oriented": RANK_FLOOR}
"""Score of a model without the knowledge, under its own head."""


def logit_lens(case: Case, *, layers: Sequence[int] | None = None) -> StressResult:
    """Rank the answers by the logit lens of every layer.

    Variants are named such as `own head, layer 5` and `base head, layer 5`; layers are counted from 0. The last layer
    under the own head is the model's output and therefore not among the variants (`tables["layers"]` has it). The
    base's head was trained on the facts and may bring some of them in, for the control as well; without a control, only
    the own head is used. Measures, all higher for more knowledge: `rank` decides (share of the distractors that are
    less probable); `logprob`, `top1` and `reciprocal_rank` of the answer's first token in the vocabulary; and
    `oriented` (see `oriented_ranks`).

    Args:
        case: Models and facts.
        layers: Layers whose outputs are read; all by default.

    Returns:
        The result of the test `logit_lens`.

    Raises:
        InputError: A layer does not exist, or states are not finite.
    """
    started = time.perf_counter()
    base, last = case.pair.base, case.pair.n_layers - 1
    chosen = _checked(layers, base)
    measured = []
    notes = [f"layer {last} under the own head is the model's output and does not count"] if last in chosen else []
    if case.control is None:
        notes.append("there is no control, so what the base's head brings in is unknown; only the own head is used")
    for role, model in case.models.items():

        def read(stream: Stream, model: Model = model) -> Iterator[tuple[str, Float[Tensor, "scored vocab"]]]:
            for layer in chosen:
                own = stream.logits(layer + 1, model)
                yield f"own head, layer {layer}", own
                if case.control is not None:
                    yield f"base head, layer {layer}", own if model is base else stream.logits(layer + 1, base)

        values = lens_values(model, case.forget, read, batch_size=case.batch_size)
        measured += [(role, name, found) for name, found in values.items()]
    output = f"own head, layer {last}"
    return StressResult(
        test="logit_lens",
        level=1,
        measure="rank",
        frame=value_rows(case.forget, [row for row in measured if row[1] != output]),
        proves=(
            "rho > 0: the answer can be read from some layer with the model's own output head. rho = 0 does not "
            "rule out that it is encoded in another basis."
        ),
        settings={"layers": chosen, "positions": "answer"},
        seconds=time.perf_counter() - started,
        floors=FLOORS,
        notes=tuple(notes),
        seed=case.seed,
        tables={"layers": _curves(measured)},
    )


def tuned_lens(
    case: Case,
    *,
    layers: Sequence[int] | None = None,
    steps: int = 100,
    lr: float = 5e-3,
    batch_tokens: int = 128,
    max_tokens: int = 4096,
) -> StressResult:
    """Rank the answers by the base's tuned lens, applied to every model (2303.08112).

    The lens is fitted on the base and on retain texts. A lens fitted on the unlearned model would learn to imitate that
    model's output. The last layer has no tuned lens, because the lens there is the head itself.

    Args:
        case: Models and facts; retain facts are needed as neutral texts.
        layers: Layers whose outputs are read; by default all but the last.
        steps: Number of Adam steps, with a learning rate that decays linearly to 0, for all layers together.
        lr: Initial learning rate.
        batch_tokens: Number of token positions per step.
        max_tokens: Maximum number of token positions to fit on, from evenly spaced texts.

    Returns:
        The result of the test `tuned_lens`.

    Raises:
        InputError: There are no retain facts, a layer does not exist, or states are not finite.
    """
    started = time.perf_counter()
    base = case.pair.base
    chosen = [layer for layer in _checked(layers, base) if layer < base.n_layers - 1]
    if case.retain is None:
        raise InputError("tuned_lens needs texts without the forget facts. Give `retain` prompts")
    if not chosen:
        raise InputError("`layers` must contain a layer before the last one, which has no tuned lens")
    states, as_tuple = _text_states(base, case.retain.prompts, max_tokens, case.batch_size)
    options = FitOptions(steps, lr, batch_tokens, case.seed)
    lens, losses = fit_translators(
        base, states[[layer + 1 for layer in chosen]], states[-1], options, as_tuple=as_tuple
    )

    def read(stream: Stream) -> Iterator[tuple[str, Float[Tensor, "scored vocab"]]]:
        translated = lens(stream.states[[layer + 1 for layer in chosen]])
        for layer, here in zip(chosen, translated, strict=True):
            yield f"layer {layer}", head_logits(base, here, as_tuple=stream.as_tuple)

    measured = [
        (role, name, values)
        for role, model in case.models.items()
        for name, values in lens_values(model, case.forget, read, batch_size=case.batch_size).items()
    ]
    return StressResult(
        test="tuned_lens",
        level=1,
        measure="rank",
        frame=value_rows(case.forget, measured),
        proves=(
            "rho > 0: the base's tuned lens, fitted without these facts, reads the answers from the unlearned "
            "model's states. rho = 0 does not rule out that another lens would read them."
        ),
        settings={
            "layers": chosen,
            "steps": steps,
            "lr": lr,
            "batch_tokens": batch_tokens,
            "tokens": states.shape[1],
        },
        seconds=time.perf_counter() - started,
        floors={},
        notes=()
        if case.control is not None
        else ("there is no control, and the base's lens may bring the facts in, so no floor is known",),
        seed=case.seed,
        tables={
            "layers": _curves(measured),
            "fit": pd.DataFrame(
                {"layer": chosen, "kl_logit_lens": losses[0].tolist(), "kl_tuned_lens": losses[1].tolist()}
            ),
        },
    )


@torch.inference_mode()
def lens_values(model: Model, facts: Facts, read: Reading, *, batch_size: int) -> dict[str, Values]:
    """Score every fact under every lens, from one forward pass per answer.

    Args:
        model: The model whose states are read.
        facts: Facts with their distractors.
        read: The lenses.
        batch_size: Maximum number of texts in one batch; no number depends on it.

    Returns:
        The values of `MEASURES` by the name of the lens.
    """
    items = [*facts.prompts.items, *(item for distractors in facts.distractors for item in distractors)]
    n = len(facts)
    logprobs: dict[str, Float[np.ndarray, " item"]] = {}
    token_ranks: dict[str, Float[np.ndarray, " item"]] = {}
    for indices, batch in even_batches(facts.prompts, items, batch_size):
        for name, logits in read(residual_stream(model, batch)):
            logprobs.setdefault(name, np.zeros(len(items)))[indices] = mean_logprobs(logits, batch)
            token_ranks.setdefault(name, np.zeros(len(items)))[indices] = first_token_ranks(logits, batch)
    counts = [len(distractors) for distractors in facts.distractors]
    found = {}
    for name, of_items in logprobs.items():
        rank = ranks(of_items[:n], of_items[n:], counts)
        first = token_ranks[name][:n]
        values = (rank, of_items[:n], (first == 1).astype(np.float64), 1 / first, oriented_ranks(rank, facts.groups))
        found[name] = dict(zip(MEASURES, values, strict=True))
    return found


def oriented_ranks(rank: Float[np.ndarray, " fact"], groups: Sequence[str]) -> Float[np.ndarray, " fact"]:
    """Return ranks that are reversed where the facts of the other groups rank below 1/2 on average.

    Methods such as NPO push right answers below distractors, and a model that tells them apart that way still knows
    them. But such a method sees the answers, and can teach a model without the knowledge to avoid them (30 steps of NPO
    on `demo:never` lower its rank to 0.18). `oriented` therefore does not show that knowledge of the base survived, and
    it is never the measure that decides. The direction is never taken from the facts that it is applied to, so the
    expected value without knowledge is at most 1/2.

    Args:
        rank: Rank of every fact; NaN where it is not defined.
        groups: Group of every fact; facts without a group count as groups of one.

    Returns:
        The reversed or unchanged ranks.
    """
    names = [group or f"fact {index}" for index, group in enumerate(groups)]
    group = np.unique(names, return_inverse=True)[1]
    above = np.where(np.isnan(rank), 0.0, rank - RANK_FLOOR)
    others = above.sum() - np.bincount(group, weights=above)[group]
    return np.where(others < 0, 1 - rank, rank)


def first_token_ranks(logits: Float[Tensor, "scored vocab"], batch: Batch) -> Float[np.ndarray, " example"]:
    """Return the rank of each answer's first token in the vocabulary.

    Args:
        logits: Logits at the scored positions of the batch.
        batch: The batch.

    Returns:
        1 for the most probable token; among equally probable tokens the last rank.
    """
    rows, tokens = batch.rows.to(logits.device), batch.next_tokens.to(logits.device)
    first = torch.cat([torch.ones_like(rows[:1], dtype=torch.bool), rows[1:] != rows[:-1]])
    here = logits[first]
    above = (here >= here.gather(-1, tokens[first][:, None])).sum(-1)
    return np.asarray(per_example(above, rows[first], len(batch.examples)).cpu().numpy())


@dataclass(frozen=True, eq=False)
class Translators:
    """The affine maps of a tuned lens, h + A h + b, one per layer.

    Attributes:
        matrix: A of every layer.
        bias: b of every layer.
    """

    matrix: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer 1 d_model"]

    def __call__(self, states: Float[Tensor, "layer scored d_model"]) -> Float[Tensor, "layer scored d_model"]:
        """Return the states as the lens translates them to outputs of the last block."""
        states = states.to(self.matrix.device, self.matrix.dtype)
        return states + states @ self.matrix.mT + self.bias


@dataclass(frozen=True)
class FitOptions:
    """Options of fitting a tuned lens.

    Attributes:
        steps: Number of Adam steps, with a learning rate that decays linearly to 0.
        lr: Initial learning rate.
        batch_tokens: Number of token positions per step.
        seed: Random seed of the positions' order.
    """

    steps: int
    lr: float
    batch_tokens: int
    seed: int


def fit_translators(
    base: Model,
    states: Float[Tensor, "layer token d_model"],
    final: Float[Tensor, "token d_model"],
    options: FitOptions,
    *,
    as_tuple: bool,
) -> tuple[Translators, Float[np.ndarray, "two layer"]]:
    """Fit all layers of a tuned lens together, by minimising KL(output || lens).

    Args:
        base: The model whose norm and head are used.
        states: Outputs of the blocks to fit.
        final: Outputs of the last block at the same positions.
        options: Options of the optimizer.
        as_tuple: Whether blocks return tuples (see `Stream`).

    Returns:
        The lens; and each layer's KL in nats over all positions, before and after fitting, [2, layer].
    """
    n_layers, n_tokens, width = states.shape
    zero = torch.zeros(n_layers, width + 1, width, device=base.device, dtype=states.dtype)
    lens = Translators(zero[:, 1:].clone(), zero[:, :1].clone())
    parameters = [lens.matrix.requires_grad_(), lens.bias.requires_grad_()]

    def kl(tokens: Tensor) -> Float[Tensor, " layer"]:
        with torch.no_grad():
            target = head_logits(base, final[tokens], as_tuple=as_tuple).log_softmax(-1)
        translated = lens(states[:, tokens])
        lensed = head_logits(base, translated.flatten(0, 1), as_tuple=as_tuple).log_softmax(-1)
        lensed = lensed.unflatten(0, (n_layers, -1))
        return (target.exp() * (target - lensed)).sum(-1).mean(-1)

    @torch.no_grad()
    def over_all() -> Float[np.ndarray, " layer"]:
        parts = torch.arange(n_tokens).split(options.batch_tokens)
        return np.asarray(sum(kl(part).double() * len(part) for part in parts).cpu().numpy()) / n_tokens  # type: ignore[union-attr]

    before = over_all()
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
    generator = torch.Generator().manual_seed(options.seed)
    for step in range(options.steps):
        tokens = torch.randint(n_tokens, (min(options.batch_tokens, n_tokens),), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 - step / options.steps)
        gradients = torch.autograd.grad(kl(tokens).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return lens, np.stack([before, over_all()])


def _text_states(
    base: Model, prompts: Prompts, max_tokens: int, batch_size: int
) -> tuple[Float[Tensor, "boundary token d_model"], bool]:
    """Return the base's states at every position of evenly spaced texts, and whether its blocks return tuples."""
    every = max(1, -(-sum(len(item.input_ids) for item in prompts.items) // max_tokens))
    texts = [replace(item, scored=range(len(item.input_ids))) for item in prompts.items[::every]]
    as_tuple = residual_stream(base, next(even_batches(prompts, texts[:1], 1))[1]).as_tuple
    return states_at(base, prompts, texts, batch_size=batch_size), as_tuple


def _checked(layers: Sequence[int] | None, model: Model) -> list[int]:
    """Return the sorted layers; all for None.

    Raises:
        InputError: A layer does not exist, or none is given.
    """
    chosen = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    missing = [layer for layer in chosen if not 0 <= layer < model.n_layers]
    if missing or not chosen:
        raise InputError(f"`layers` must be from 0 to {model.n_layers - 1} for {model.name}, got {list(chosen)}")
    return chosen


def _curves(measured: Iterable[tuple[str, str, Values]]) -> pd.DataFrame:
    """Return the means over facts: one row per role and lens, one column per measure."""
    return pd.DataFrame(
        {"role": role, "lens": name} | {measure: float(np.nanmean(row)) for measure, row in values.items()}
        for role, name, values in measured
    )
