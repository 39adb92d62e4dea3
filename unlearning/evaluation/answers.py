"""Answers during training: probability, ROUGE and exact matches on examples, as numbers by name."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.data.batches import Span, collate
from unlearning.data.chat import ChatFormat
from unlearning.data.question_answer import Example
from unlearning.data.spans import AnswerSpan
from unlearning.evaluation.generation import greedy_answers
from unlearning.evaluation.metrics.text_match import exact_match, rouge_l_recall
from unlearning.objectives.forward import answer_sequence_nll

LIKELIHOODS = ("nll", "probability")
GENERATED = ("rouge", "exact")


@torch.no_grad()
def answer_likelihoods(model: PreTrainedModel, spans: Sequence[Span], *, batch_size: int) -> dict[str, float]:
    """Compute the mean over examples of the answers' negative log-likelihood per token and of its exponential.

    The tokens that close an answer are not counted: where the data are cut from longer texts, a model that knows the
    answer does not end there.

    Args:
        model: The model; it keeps its mode.
        spans: Prompts and answers as tokens.
        batch_size: Number of examples at a time.

    Returns:
        `nll`: mean over examples of L_b / n_b, in nats per token. `probability`: mean over examples of exp(-L_b / n_b),
        0 to 1, TOFU's "probability" (2401.06121, the answer's probability to the power of one over its length; there,
        and in `unlearn eval tofu`, with the closing token).
    """
    was_training = model.training
    model.eval()
    try:
        means: list[float] = []
        for first in range(0, len(spans), batch_size):
            last = first + batch_size
            some = [span.without_closing() if isinstance(span, AnswerSpan) else span for span in spans[first:last]]
            batch = collate(some).to(model.device)
            counts = batch.predicts_answer.sum(dim=1).clamp(min=1)
            means += (answer_sequence_nll(model, batch).double() / counts).tolist()
    finally:
        model.train(was_training)
    return {"nll": _mean(means), "probability": _mean([math.exp(-value) for value in means])}


def answer_matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int = 64,
    chat: ChatFormat | None = None,
) -> dict[str, float]:
    """Compute mean ROUGE-L recall and share of exact answers of greedy answers; the examples must have prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        examples: Prompts and the answers to compare with.
        batch_size: Number of prompts at a time.
        max_new_tokens: Maximum number of tokens of an answer.
        chat: Chat template that the prompts were wrapped in, or None.

    Returns:
        `rouge` and `exact`, both 0 to 1; no `rouge` where no answer has a word.
    """
    prompts = [example.prompt for example in examples]
    answers = greedy_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        chat=chat,
    )
    pairs = list(zip(answers, examples, strict=True))
    recalls = [rouge_l_recall(answer, example.answer) for answer, example in pairs]
    counted = [recall for recall in recalls if recall is not None]
    exact = {"exact": _mean([float(exact_match(answer, example.answer)) for answer, example in pairs])}
    return ({"rouge": _mean(counted)} if counted else {}) | exact


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
