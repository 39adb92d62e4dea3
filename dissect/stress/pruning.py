"""Pruning: set to zero what suppresses the answers. Values are only ever set to zero, so nothing is put in.

    prune_changed      MLP neurons whose contribution to the residual stream moved furthest from the base's (only the
                       choice uses the base)
    prune_important    set-difference pruning (2402.05162, as 2409.18025 uses it): the weights that matter most for what
                       the model says to forget questions, except those that matter for what it says to retain questions

A neuron's contribution at a position is m v, its coefficient times its value vector (a column of the down projection),
and

    change = mean |m_u v_u - m_b v_b|      over the answer positions of each fact, then over facts

A weight's importance is its SNIP score, mean |W dL/dW| over texts, with L the loss of the model's own greedy answer:
its behaviour after unlearning, whatever that is. The right answers have no part in any choice.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dissect.coefficients.changes import paired_coefficients
from dissect.coefficients.hooks import down_projections
from dissect.coefficients.neurons import value_vectors
from dissect.models.model import Model
from dissect.models.module_tree import with_values
from dissect.prompts.prompts import Prompts
from dissect.stress.core.case import Case, spread
from dissect.stress.core.distractors import Facts
from dissect.stress.core.result import PLAIN, StressResult, fact_rows
from dissect.stress.core.scores import MEASURES, FactScores, score_facts
from unlearning.common.errors import InputError

SHARES = ((1.0, 1.0), (5.0, 5.0))
"""Percentages (q, p) of each matrix that matter most for forget and for retain questions."""

N_TEXTS = 32
"""Number of texts of each set whose gradients are used."""

PROVES = (
    "rho > 0: with some of its own {what} set to zero and nothing put in, the model knows the facts better than the"
    " control that was pruned in the same way, so its weights held them. rho = 0: no set of so few {what} hides "
    "them."
)


def prune_changed(case: Case, *, counts: Sequence[int] | None = None, random: int = 1) -> StressResult:
    """Set the value vectors of the most changed neurons to zero; one variant per number of neurons.

    Args:
        case: Models and facts.
        counts: Numbers of neurons; by default 8, 64, 512, ... up to a tenth of all.
        random: Number of draws of as many random neurons, for comparison.

    Returns:
        The result of the test `prune_changed`, with the table `random`: `role`, `neurons`, `draw` and the mean of each
        measure.

    Raises:
        InputError: A number of neurons is not possible for this model, or the model is a mixture of experts.
    """
    started = time.perf_counter()
    base = case.pair.base
    total = sum(len(value_vectors(base, layer)) for layer in range(base.n_layers))
    if counts is None:
        counts = [n for n in (8**power for power in range(1, 12)) if n <= max(8, total // 10)]
    if not counts or len(set(counts)) < len(counts) or not 1 <= min(counts) <= max(counts) <= total:
        given = ", ".join(map(str, counts)) or "none"
        raise InputError(f"`counts` must be different numbers of neurons from 1 to {total}, got {given}")
    scored: list[tuple[str, str, FactScores]] = []
    compared = []
    for role, model in case.models.items():
        scored.append((role, PLAIN, score_facts(model, case.forget, batch_size=case.batch_size)))
        if role == "base":
            continue
        change = neuron_change(base, model, case.forget.prompts, batch_size=case.batch_size)
        ranking = change.flatten().argsort(descending=True, stable=True)
        for count in counts:
            chosen = _mask(ranking[:count], change.shape)
            after = without_neurons(model, chosen)
            scored.append((role, f"top {count}", score_facts(after, case.forget, batch_size=case.batch_size)))
            for draw in range(random):
                order = np.random.default_rng([case.seed, draw]).permutation(total)[:count]
                other = without_neurons(model, _mask(torch.from_numpy(order), change.shape))
                scores = score_facts(other, case.forget, batch_size=case.batch_size)
                compared.append({"role": role, "neurons": count, "draw": draw, **_means(scores)})
    return StressResult(
        test="prune_changed",
        level=4,
        measure=MEASURES[0],
        frame=fact_rows(case.forget, scored),
        proves=PROVES.format(what="neurons"),
        settings={"counts": list(counts), "random": random},
        seconds=time.perf_counter() - started,
        seed=case.seed,
        tables={"random": pd.DataFrame(compared)},
    )


def prune_important(
    case: Case, *, shares: Sequence[tuple[float, float]] = SHARES, n_texts: int = N_TEXTS
) -> StressResult:
    """Set to zero the weights that matter for a model's answers to forget questions but not to retain questions.

    Args:
        case: Models and facts; retain facts are needed.
        shares: Pairs (q, p), one variant each: of each matrix's weights the q % that matter most for forget questions,
            except the p % that matter most for retain questions.
        n_texts: Number of texts of each set that the importance is computed on.

    Returns:
        The result of the test `prune_important`, with the tables `pruned` (`role`, `variant`, `share` of weights that
        were set to zero) and `random` (`role`, `variant`, and the mean of each measure after as many random weights of
        each matrix were set to zero).

    Raises:
        InputError: There are no retain facts, or a share is not above 0 and at most 100.
    """
    started = time.perf_counter()
    if case.retain is None:
        raise InputError("prune_important needs retain prompts. Give `retain`")
    if not shares or len(set(shares)) < len(shares) or not all(0 < each <= 100 for pair in shares for each in pair):
        raise InputError(f"`shares` must be different pairs of percentages above 0 and up to 100, got {list(shares)}")
    asked = [spread(facts, n_texts) for facts in (case.forget, case.retain)]
    scored: list[tuple[str, str, FactScores]] = []
    pruned, compared = [], []
    for role, model in case.models.items():
        scored.append((role, PLAIN, score_facts(model, case.forget, batch_size=case.batch_size)))
        if role == "base":
            continue
        forget, retain = (snip_scores(model, own_answers(model, facts)) for facts in asked)
        for q, p in shares:
            variant = f"q {q:g} %, p {p:g} %"
            chosen = {name: _top(forget[name], q) & ~_top(retain[name], p) for name in forget}
            scores = score_facts(without_weights(model, chosen), case.forget, batch_size=case.batch_size)
            scored.append((role, variant, scores))
            n, total = (sum(int(of(mask)) for mask in chosen.values()) for of in (torch.sum, torch.numel))
            pruned.append({"role": role, "variant": variant, "share": n / total})
            other = without_weights(model, _shuffled(chosen, seed=case.seed))
            scores = score_facts(other, case.forget, batch_size=case.batch_size)
            compared.append({"role": role, "variant": variant, **_means(scores)})
    return StressResult(
        test="prune_important",
        level=4,
        measure=MEASURES[0],
        frame=fact_rows(case.forget, scored),
        proves=PROVES.format(what="weights"),
        settings={"shares": [list(pair) for pair in shares], "n_texts": n_texts},
        seconds=time.perf_counter() - started,
        seed=case.seed,
        tables={"pruned": pd.DataFrame(pruned), "random": pd.DataFrame(compared)},
    )


@torch.inference_mode()
def neuron_change(base: Model, other: Model, prompts: Prompts, *, batch_size: int = 64) -> Float[Tensor, "layer d_mlp"]:
    """Return how far each neuron's contribution to the residual stream moved: `change` in the module's docstring.

    Args:
        base: The model before unlearning.
        other: The model to compare with it.
        prompts: The facts.
        batch_size: Maximum number of texts in one batch; no number depends on it.

    Returns:
        The change of every neuron, on the CPU.

    Raises:
        InputError: A model is a mixture of experts, or streamed.
    """
    pairs = [tuple(value_vectors(model, layer).double() for model in (base, other)) for layer in range(base.n_layers)]
    squares = [[torch.stack([v.square().sum(-1) for v in pair]), (pair[0] * pair[1]).sum(-1)] for pair in pairs]
    total = torch.zeros(base.n_layers, len(pairs[0][0]), dtype=torch.float64, device=base.device)
    for batch, ours, theirs in paired_coefficients(base, other, prompts, batch_size=batch_size):
        lengths = torch.tensor([prompts.items[example].n_answer_tokens for example in batch.examples])
        weights = (1 / (lengths[batch.rows] * len(prompts))).double().to(ours.device)
        for layer, (norms, dot) in enumerate(squares):
            b, u = ours[layer].double(), theirs[layer].double()
            # |u v_u - b v_b|^2, without a vector for each position and neuron.
            moved = b.square() * norms[0] + u.square() * norms[1] - 2 * b * u * dot
            total[layer] += weights @ moved.clamp(min=0).sqrt()
    return total.cpu()


@torch.no_grad()
def without_neurons(model: Model, chosen: Bool[Tensor, "layer d_mlp"]) -> Model:
    """Set the value vectors of some neurons to zero.

    Args:
        model: The model; it is not changed.
        chosen: The neurons, as a mask.

    Returns:
        The pruned model.
    """
    paths = {module: path for path, module in model.hf.named_modules()}
    values = {}
    for layer, module in enumerate(down_projections(model)):
        if not chosen[layer].any():
            continue
        weight: Tensor = module.get_parameter("weight").data
        gone = chosen[layer].to(weight.device)
        values[f"{paths[module]}.weight"] = weight.masked_fill(gone[:, None] if isinstance(module, Conv1D) else gone, 0)
    return replace(model, hf=with_values(model.hf, values), sha256=f"{model.sha256} pruned")


@torch.no_grad()
def without_weights(model: Model, chosen: Mapping[str, Bool[Tensor, "rows columns"]]) -> Model:
    """Set some weights to zero.

    Args:
        model: The model; it is not changed.
        chosen: The weights, as a mask by the name of their parameter.

    Returns:
        The pruned model.
    """
    values = {name: model.hf.get_parameter(name).data.masked_fill(mask, 0) for name, mask in chosen.items()}
    return replace(model, hf=with_values(model.hf, values), sha256=f"{model.sha256} pruned")


@torch.inference_mode()
def own_answers(model: Model, facts: Facts) -> Prompts:
    """Replace the right answers by the model's own greedy answers of the same length.

    Args:
        model: The model.
        facts: The facts.

    Returns:
        The prompts.
    """
    items = list(facts.prompts.items)
    longest = max(item.n_answer_tokens for item in items)
    ids = [list(item.input_ids[: item.answer_start]) for item in items]
    for _ in range(longest):
        grown = tuple(
            replace(item, input_ids=tuple(row), scored=range(len(row) - 1, len(row)))
            for item, row in zip(items, ids, strict=True)
        )
        for batch in replace(facts.prompts, items=grown).batches(64):
            likeliest = _logits(model.hf, model, batch).argmax(-1).tolist()
            for example, token in zip(batch.examples, likeliest, strict=True):
                ids[example].append(token)
    answered = []
    for item, row in zip(items, ids, strict=True):
        row = row[: len(item.input_ids)]
        answered.append(replace(item, input_ids=tuple(row), scored=range(item.answer_start - 1, len(row) - 1)))
    return replace(facts.prompts, items=tuple(answered))


def snip_scores(model: Model, prompts: Prompts) -> dict[str, Float[Tensor, "rows columns"]]:
    """Return mean |W dL/dW| over the prompts, one gradient each, for every linear weight except the head's.

    Args:
        model: The model.
        prompts: The prompts; L is the mean negative log-likelihood of the answer's tokens.

    Returns:
        The scores by the name of the parameter.
    """
    head = model.hf.get_output_embeddings()
    names = [
        f"{path}.weight"
        for path, module in model.hf.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    # Copies that share their numbers, so that the model's own parameters get no gradients.
    hf = with_values(model.hf, {name: model.hf.get_parameter(name).data for name in names})
    weights = {name: hf.get_parameter(name).requires_grad_() for name in names}
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in prompts.batches(1):
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(_logits(hf, model, batch), batch.next_tokens.to(model.device))
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            scores[name] += (weight.detach() * gradient).abs_() / len(prompts)
    return scores


def _logits(hf: nn.Module, model: Model, batch: Any) -> Float[Tensor, "scored vocab"]:
    """Return logits at the batch's scored positions, in float32 or wider; gradients flow through if enabled."""
    batch = batch.to(model.device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if model.takes_position_ids:
        inputs["position_ids"] = batch.position_ids
    logits: Tensor = hf(**inputs, use_cache=False).logits[batch.rows, batch.columns]
    return logits if logits.dtype == torch.float64 else logits.float()


def _top(scores: Float[Tensor, "rows columns"], per_cent: float) -> Bool[Tensor, "rows columns"]:
    """Return a mask of the given percentage of a matrix's scores that are highest; at least one."""
    chosen = scores.flatten().topk(max(1, round(scores.numel() * per_cent / 100))).indices
    return (
        torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device).index_fill(0, chosen, True).view_as(scores)
    )


def _shuffled(chosen: Mapping[str, Bool[Tensor, "rows columns"]], *, seed: int) -> dict[str, Tensor]:
    """Return masks of as many weights of each matrix, at random positions."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view_as(mask)
        for name, mask in chosen.items()
    }


def _mask(flat: Tensor, shape: torch.Size) -> Bool[Tensor, "layer d_mlp"]:
    """Return a mask that is true at these flat indices."""
    return torch.zeros(shape.numel(), dtype=torch.bool).index_fill(0, flat, True).view(shape)


def _means(scores: FactScores) -> dict[str, float]:
    """Return the mean of each measure over facts."""
    return {name: float(np.nanmean(values)) for name, values in scores.columns().items()}
