"""Compute a row per example: both models' generations, their similarity, and the probability of the answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dissect.models.model import Model
from dissect.prompts.prompts import Batch, Prompts
from dissect.scoring.forward import scored_logits
from dissect.scoring.recovery import answer_logprob, kl_from_base, per_example
from unlearning.common.errors import InputError
from unlearning.data.concept_vectors import cut_continuation
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.metrics.text_match import exact_match
from unlearning.evaluation.metrics.text_similarity import bleu, rouge_l


@dataclass(frozen=True, eq=False)
class Models:
    """Models that are compared; all use the base's tokenizer.

    Attributes:
        base: Base model.
        targets: Models that are compared with the base, by name (`unlearned`, `control`).
    """

    base: Model
    targets: Mapping[str, Model]


def example_rows(
    models: Models,
    prompts: Prompts,
    indices: Sequence[int],
    *,
    set_name: str,
    true_answers: bool,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Compute the rows of some prompts as one batch.

    Args:
        models: Models that are compared.
        prompts: Prompts of the set.
        indices: Indices of the prompts in the batch.
        set_name: Name of the set.
        true_answers: Compute exact match with the answer; otherwise it is NaN.
        max_new_tokens: Length of a generation, in tokens.

    Returns:
        One row per target and example; for the columns see `BehaviourResult`.

    Raises:
        InputError: Logits are not finite.
    """
    chosen = replace(prompts, items=tuple(prompts.items[index] for index in indices))
    (batch,) = chosen.batches(len(indices), padding_side="left")

    def said(model: Model) -> list[str]:
        return greedy_answers(
            model.hf,
            models.base.tokenizer,
            [item.prompt for item in chosen.items],
            max_new_tokens=max_new_tokens,
            batch_size=len(indices),
            chat=chosen.chat,
        )

    texts_base, base_logprobs = said(models.base), _logprobs(models.base, batch)
    before = _answer_scores(base_logprobs, base_logprobs, batch)
    rows = []
    for target, model in models.targets.items():
        after = _answer_scores(base_logprobs, _logprobs(model, batch), batch)
        for place, (item, text_base, text) in enumerate(zip(chosen.items, texts_base, said(model), strict=True)):
            overlap = rouge_l(text, text_base)
            row = {
                "target": target,
                "set": set_name,
                "example": item.id,
                "example_index": indices[place],
                "group": item.group,
                "n_answer_tokens": item.n_answer_tokens,
                "prompt": item.prompt,
                "answer": item.answer,
                "text_base": text_base,
                "text": text,
                "bleu": bleu(text, text_base),
                "rouge_l": float("nan") if overlap is None else overlap,
            }
            for suffix, said_text, scores in (("_base", text_base, before), ("", text, after)):
                logprob = scores["logprob"][place].double()
                row |= {
                    f"exact_match{suffix}": float(is_answer(said_text, item.answer)) if true_answers else float("nan"),
                    f"logprob{suffix}": logprob.item(),
                    f"probability{suffix}": logprob.exp().item(),
                    f"perplexity{suffix}": (-logprob).exp().item(),
                }
            rows.append(row | {"kl": after["kl"][place].item()})
    return rows


def is_answer(text: str, answer: str) -> bool:
    """Return whether a generated text equals the answer, at least up to its first line break or next `Question:`.

    A model that was not trained to stop continues with further questions, which does not make the answer wrong.

    Args:
        text: Generated text.
        answer: True answer.

    Returns:
        Whether they match, by `unlearning.evaluation.metrics.text_match.exact_match`.
    """
    return exact_match(text, answer) or exact_match(cut_continuation(text), answer)


def _logprobs(model: Model, batch: Batch) -> Float[Tensor, "scored vocab"]:
    logits = scored_logits(model, batch)
    if not torch.isfinite(logits).all():
        raise InputError(f"{model.name} gives logits that are not finite. Check the checkpoint.")
    return logits.log_softmax(-1)


def _answer_scores(
    base_logprobs: Float[Tensor, "scored vocab"], logprobs: Float[Tensor, "scored vocab"], batch: Batch
) -> dict[str, Float[Tensor, " example"]]:
    """Average the token's log-probability and KL(base || model) over each answer's tokens, in nats."""
    rows, next_tokens = batch.rows.to(logprobs.device), batch.next_tokens.to(logprobs.device)
    n = len(batch.examples)
    return {
        "logprob": per_example(answer_logprob(logprobs, next_tokens), rows, n).cpu(),
        "kl": per_example(kl_from_base(base_logprobs.to(logprobs.device), logprobs), rows, n).cpu(),
    }
