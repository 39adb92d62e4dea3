"""How well a model knows facts: four scores of every fact, all higher for a model that knows it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from dissect.models.model import Model
from dissect.prompts.prompts import Prompt, Prompts
from dissect.scoring.forward import scored_logits
from dissect.scoring.recovery import answer_logprob, per_example
from dissect.stress.core.distractors import Facts
from dissect.stress.core.prompts_once import score_with_prompts_once
from dissect.stress.core.residual_stream import even_batches
from unlearning.common.errors import InputError

MEASURES = ("rank", "logprob", "correct", "accuracy")
"""The columns of `FactScores`, the one that decides first."""

RANK_FLOOR = 0.5
"""What knowing nothing scores on `rank`."""


@dataclass(frozen=True, eq=False)
class FactScores:
    """One model on some facts.

    Attributes:
        logprob: mean log-probability of the answer's tokens, in nats.
        rank: share of the wrong answers whose mean log-probability is lower, ties counting half: 1 where the answer
            beats all of them, 1/2 where nothing is known; NaN where a fact has no wrong answers.
        correct: 1 where every answer token is the likeliest one, given those before it, else 0.
        accuracy: of a multiple choice (RTT's, 2410.08827): 1 where the answer beats every wrong one, else 0. A fact
            that a model was taught to avoid is at worst 0, near what guessing gives; its rank falls far below.
    """

    rank: Float[np.ndarray, " fact"]
    logprob: Float[np.ndarray, " fact"]
    correct: Float[np.ndarray, " fact"]
    accuracy: Float[np.ndarray, " fact"]

    def columns(self) -> dict[str, Float[np.ndarray, " fact"]]:
        """The scores by name, in the order of `MEASURES`."""
        return {name: getattr(self, name) for name in MEASURES}


def score_facts(model: Model, facts: Facts, *, batch_size: int = 64) -> FactScores:
    """Score every fact, teacher-forced; hooks that are on `model.hf` take part.

    Every prompt is run once for all of its answers, where the model allows it; under hooks that may look at whole texts
    (all but `prompts_once.Pointwise` ones) every answer runs with its prompt.

    Args:
        model: in memory.
        facts: with their wrong answers.
        batch_size: most texts in one batch; no number depends on it.

    Raises:
        InputError: logits that are not finite.
    """
    return fact_scores(facts, *all_answers(model, facts, batch_size=batch_size))


def all_answers(
    model: Model, facts: Facts, *, batch_size: int = 64
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    """What `score_answers` gives for every answer: of each fact the right one, then its wrong ones.

    Args:
        model: in memory.
        facts: with their wrong answers.
        batch_size: see `score_facts`.

    Raises:
        InputError: logits that are not finite.
    """
    asked = [(right, *wrong) for right, wrong in zip(facts.prompts.items, facts.distractors, strict=True)]
    items = [item for answers in asked for item in answers]
    scores = score_with_prompts_once(model, asked, pad_token_id=facts.prompts.pad_token_id, batch_size=batch_size)
    if scores is None or not _agree(model, facts.prompts, items, scores[0]):
        return score_answers(model, facts.prompts, items, batch_size=batch_size)
    return scores


def right_places(facts: Facts) -> Int[np.ndarray, " fact"]:
    """Where the right answers are among all answers."""
    return np.cumsum([0, *(len(wrong) + 1 for wrong in facts.distractors)])[:-1]


def fact_scores(facts: Facts, logprob: Float[np.ndarray, " item"], correct: Float[np.ndarray, " item"]) -> FactScores:
    """The scores of facts from those of all their answers (`all_answers`)."""
    places = right_places(facts)
    wrong = np.delete(logprob, places)
    rank = ranks(logprob[places], wrong, [len(some) for some in facts.distractors])
    return FactScores(
        rank=rank,
        logprob=logprob[places],
        correct=correct[places],
        accuracy=np.where(np.isnan(rank), np.nan, rank == 1),
    )


def chance_accuracy(facts: Facts) -> float:
    """What guessing scores on `accuracy`, over the facts that have wrong answers."""
    return float(np.mean([1 / (len(wrong) + 1) for wrong in facts.distractors if wrong] or [np.nan]))


def _agree(model: Model, prompts: Prompts, items: Sequence[Prompt], logprob: Float[np.ndarray, " item"]) -> bool:
    """Whether the scores are those of whole texts, as they are but where a model's cache does not do what it should.

    Tried on four texts whose answers have several tokens, from the shortest to the longest.
    """
    places = sorted(range(len(items)), key=lambda place: len(items[place].input_ids))
    several = [place for place in places if items[place].n_answer_tokens > 1] or places
    probes = [several[place] for place in np.linspace(0, len(several) - 1, 4).astype(int)]
    whole, _ = score_answers(model, prompts, [items[place] for place in probes])
    tolerance = torch.finfo(model.hf.dtype).eps ** 0.5
    return np.allclose(logprob[probes], whole, rtol=tolerance, atol=tolerance)


def ranks(
    right: Float[np.ndarray, " fact"], wrong: Float[np.ndarray, " wrong"], counts: Sequence[int]
) -> Float[np.ndarray, " fact"]:
    """Share of each fact's wrong answers that score below its right one, ties counting half; NaN without any.

    Args:
        right: score of each right answer.
        wrong: scores of all wrong answers, fact by fact.
        counts: how many of them each fact has.
    """
    fact = np.repeat(np.arange(len(right)), counts)
    beaten = (wrong < right[fact]) + 0.5 * (wrong == right[fact])
    totals = np.bincount(fact, weights=beaten, minlength=len(right))
    n = np.asarray(counts, dtype=np.float64)
    return np.divide(totals, n, out=np.full(len(right), np.nan), where=n > 0)


@torch.inference_mode()
def score_answers(
    model: Model, prompts: Prompts, items: Sequence[Prompt], *, batch_size: int = 64
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    """Mean log-probability of each answer's tokens in nats, and 1 where all of them are the likeliest, else 0.

    Args:
        model: in memory.
        prompts: says what batches are padded with.
        items: what to score; those of one length run together.
        batch_size: most of them in one batch.

    Raises:
        InputError: logits that are not finite.
    """
    logprob, correct = np.zeros(len(items)), np.zeros(len(items))
    for places, batch in even_batches(prompts, items, batch_size):
        logits = scored_logits(model, batch)
        if not torch.isfinite(logits).all():
            raise InputError(f"{model.name}: gives logits that are not finite; is the checkpoint sound?")
        rows, tokens = batch.rows.to(logits.device), batch.next_tokens.to(logits.device)
        of_token = answer_logprob(logits.log_softmax(-1), tokens)
        likeliest = (logits.argmax(-1) == tokens).double()
        logprob[places] = per_example(of_token, rows, len(places)).cpu().numpy()
        correct[places] = (per_example(likeliest, rows, len(places)) == 1).double().cpu().numpy()
    return logprob, correct
