"""Lenses: what the final norm and a head read off the residual stream, layer by layer.

Logit lens:  p_l = softmax(W_U norm(h_l)),  with a model's own norm and head, and with the base's.
Tuned lens:  p_l = softmax(W_U norm(h_l + A_l h_l + b_l)),  with the base's norm and head; A_l and b_l start at zero and
are fitted on the base to its own output (KL) on texts without the forget facts, and then read every model.

An answer is scored teacher-forced, as the output itself would be: the mean log-probability of its tokens.
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
"""Values of every fact by measure."""

Reading = Callable[[Stream], Iterator[tuple[str, Float[Tensor, "scored vocab"]]]]
"""What lenses see in a stream: logits by the name of the lens and its layer."""

MEASURES = ("rank", "logprob", "top1", "reciprocal_rank", "oriented")

FLOORS = {"rank": RANK_FLOOR, "oriented": RANK_FLOOR}
"""What knowing nothing scores under the own head."""


def logit_lens(case: Case, *, layers: Sequence[int] | None = None) -> StressResult:
    """Whether the answer can be read off the residual stream of any layer (section 5 of the protocols).

    Variants are `own head, layer 5` and `base head, layer 5`; layers are counted from 0, as blocks are. The last
    layer under the own head is the model's output and not among them (`tables["layers"]` has it). The base's head
    learned the facts along with the base and may bring some of them in, for the never model alike: where there is no
    never model only the own head is used. Measures, all higher where more is known: `rank` decides (share of the wrong
    answers that are less probable), `logprob`, `top1` and `reciprocal_rank` of the answer's first token in the
    vocabulary, and `oriented` (see `oriented_ranks`).

    Args:
        case: models and facts.
        layers: which blocks' outputs are read; by default all.

    Raises:
        InputError: a layer that there is not, or states that are not finite.
    """
    started = time.perf_counter()
    base, last = case.pair.base, case.pair.n_layers - 1
    chosen = _checked(layers, base)
    measured = []
    notes = [f"layer {last} under the own head is the output itself and does not decide"] if last in chosen else []
    if case.control is None:
        notes.append("without a never model nothing tells what the base's head brings in: only the own head is used")
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
            "Above zero, the final norm and a head read the answer off some layer's states better than off those of a "
            "model that never knew: it is there in the basis of the output. None does not show that it is in no other."
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
    """Whether the base's tuned lens reads the answer off another model's layers (section 5; 2303.08112).

    The lens is fitted on the base and on retain texts: one that is fitted on the unlearned model learns to imitate its
    output. The last layer has none, since the lens is the head there.

    Args:
        case: models and facts; needs retain facts, the neutral text.
        layers: which blocks' outputs are read; by default all but the last.
        steps: of Adam, with linear decay, for all layers at once.
        lr: its learning rate.
        batch_tokens: positions in one step.
        max_tokens: positions of text at most, evenly spaced.

    Raises:
        InputError: no retain facts, a layer that there is not, or states that are not finite.
    """
    started = time.perf_counter()
    base = case.pair.base
    chosen = [layer for layer in _checked(layers, base) if layer < base.n_layers - 1]
    if case.retain is None:
        raise InputError("tuned_lens is fitted on texts without the forget facts: give retain prompts")
    if not chosen:
        raise InputError("tuned_lens has no layer to read: the last one has no lens of its own; choose an earlier one")
    states, as_tuple = _text_states(base, case.retain.prompts, max_tokens, case.batch_size)
    lens, losses = fit_translators(
        base,
        states[[layer + 1 for layer in chosen]],
        states[-1],
        as_tuple=as_tuple,
        steps=steps,
        lr=lr,
        batch_tokens=batch_tokens,
        seed=case.seed,
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
            "Above zero, what turns the base's states into its answers, fitted without these facts, reads them off "
            "the unlearned model's states too. None does not show that no other reading would."
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
        notes=() if case.control is not None else ("the base's lens may bring the facts in: there is no floor",),
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
    """`MEASURES` of every fact under every lens, from one forward of each answer.

    Args:
        model: whose states are read.
        facts: with their wrong answers.
        read: the lenses.
        batch_size: most texts in one batch; no number depends on it.
    """
    items = [*facts.prompts.items, *(item for wrong in facts.distractors for item in wrong)]
    n = len(facts)
    logprobs: dict[str, Float[np.ndarray, " item"]] = {}
    token_ranks: dict[str, Float[np.ndarray, " item"]] = {}
    for places, batch in even_batches(facts.prompts, items, batch_size):
        for name, logits in read(residual_stream(model, batch)):
            logprobs.setdefault(name, np.zeros(len(items)))[places] = mean_logprobs(logits, batch)
            token_ranks.setdefault(name, np.zeros(len(items)))[places] = first_token_ranks(logits, batch)
    counts = [len(wrong) for wrong in facts.distractors]
    found = {}
    for name, of_items in logprobs.items():
        rank = ranks(of_items[:n], of_items[n:], counts)
        first = token_ranks[name][:n]
        values = (rank, of_items[:n], (first == 1).astype(np.float64), 1 / first, oriented_ranks(rank, facts.groups))
        found[name] = dict(zip(MEASURES, values, strict=True))
    return found


def oriented_ranks(rank: Float[np.ndarray, " fact"], groups: Sequence[str]) -> Float[np.ndarray, " fact"]:
    """Ranks turned round where the facts of the other groups lie below 1/2 in the mean.

    Methods as NPO push right answers below wrong ones, and telling them apart is knowing them. But such a method sees
    the answers and can teach a model that never knew them to avoid them (30 steps of NPO on `demo:never` bring its
    rank to 0.18): `oriented` does not show that knowledge of the base survived, and never decides. The sign never
    comes from the facts that it is put on, so that of knowing nothing no more than 1/2 is made, in the mean even less.

    Args:
        rank: of every fact, NaN where there is none.
        groups: of every fact; where there are none each fact is its own.
    """
    names = [group or f"fact {place}" for place, group in enumerate(groups)]
    group = np.unique(names, return_inverse=True)[1]
    above = np.where(np.isnan(rank), 0.0, rank - RANK_FLOOR)
    others = above.sum() - np.bincount(group, weights=above)[group]
    return np.where(others < 0, 1 - rank, rank)


def first_token_ranks(logits: Float[Tensor, "scored vocab"], batch: Batch) -> Float[np.ndarray, " example"]:
    """Place of each answer's first token among all tokens, 1 for the likeliest; of equally likely ones the last."""
    rows, tokens = batch.rows.to(logits.device), batch.next_tokens.to(logits.device)
    first = torch.cat([torch.ones_like(rows[:1], dtype=torch.bool), rows[1:] != rows[:-1]])
    here = logits[first]
    above = (here >= here.gather(-1, tokens[first][:, None])).sum(-1)
    return np.asarray(per_example(above, rows[first], len(batch.examples)).cpu().numpy())


@dataclass(frozen=True, eq=False)
class Translators:
    """The affine maps of a tuned lens, h + A h + b, one per layer."""

    matrix: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer 1 d_model"]

    def __call__(self, states: Float[Tensor, "layer scored d_model"]) -> Float[Tensor, "layer scored d_model"]:
        """States as if they had come out of the last block."""
        states = states.to(self.matrix.device, self.matrix.dtype)
        return states + states @ self.matrix.mT + self.bias


def fit_translators(
    base: Model,
    states: Float[Tensor, "layer token d_model"],
    final: Float[Tensor, "token d_model"],
    *,
    as_tuple: bool,
    steps: int,
    lr: float,
    batch_tokens: int,
    seed: int,
) -> tuple[Translators, Float[np.ndarray, "two layer"]]:
    """Fit all layers of a tuned lens together, by KL(output || lens).

    Args:
        base: whose norm and head.
        states: what some blocks hand on.
        final: what the last one hands on there.
        as_tuple: see `Stream`.
        steps: of Adam with linear decay.
        lr: its learning rate.
        batch_tokens: positions in one step.
        seed: of their order.

    Returns:
        The lens, and each layer's KL in nats over all positions before and after.
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
        parts = torch.arange(n_tokens).split(batch_tokens)
        return np.asarray(sum(kl(part).double() * len(part) for part in parts).cpu().numpy()) / n_tokens  # type: ignore[union-attr]

    before = over_all()
    optimizer = torch.optim.Adam(parameters, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        tokens = torch.randint(n_tokens, (min(batch_tokens, n_tokens),), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        gradients = torch.autograd.grad(kl(tokens).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return lens, np.stack([before, over_all()])


def _text_states(
    base: Model, prompts: Prompts, max_tokens: int, batch_size: int
) -> tuple[Float[Tensor, "place token d_model"], bool]:
    """The base's stream at every position of some texts, and whether its blocks hand on tuples."""
    every = max(1, -(-sum(len(item.input_ids) for item in prompts.items) // max_tokens))
    texts = [replace(item, scored=range(len(item.input_ids))) for item in prompts.items[::every]]
    as_tuple = residual_stream(base, next(even_batches(prompts, texts[:1], 1))[1]).as_tuple
    return states_at(base, prompts, texts, batch_size=batch_size), as_tuple


def _checked(layers: Sequence[int] | None, model: Model) -> list[int]:
    chosen = list(range(model.n_layers)) if layers is None else sorted(set(layers))
    wrong = [layer for layer in chosen if not 0 <= layer < model.n_layers]
    if wrong or not chosen:
        raise InputError(f"layers {layers}: {model.name} has the layers 0 to {model.n_layers - 1}; give some of them")
    return chosen


def _curves(measured: Iterable[tuple[str, str, Values]]) -> pd.DataFrame:
    """Means over facts: one row per role and lens, one column per measure."""
    return pd.DataFrame(
        {"role": role, "lens": name} | {measure: float(np.nanmean(row)) for measure, row in values.items()}
        for role, name, values in measured
    )
