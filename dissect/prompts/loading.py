"""Load prompts from files and records."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from dissect.prompts.notebook import notebook_prompts
from dissect.prompts.prompts import Prompt, Prompts, Scoring, check_in_memory
from dissect.prompts.records import Question, questions
from unlearning.common.errors import InputError, check_at_least
from unlearning.data.chat import chat_format
from unlearning.data.concept_vectors import NOTEBOOK_TEMPLATE, cut_continuation
from unlearning.data.records import read_records
from unlearning.data.spans import encode_answer

if TYPE_CHECKING:
    from dissect.models.model import Model


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    scoring: Scoring = "answer",
    template: str | None = None,
    chat: bool = False,
    answers: Literal["given", "base"] = "given",
    answers_from: "Model | None" = None,
    max_new_tokens: int = 30,
    limit: int | None = None,
) -> Prompts:
    r"""Read prompts with answers, tokenise them and find the answer positions.

    Args:
        path: A JSON list or JSON lines of `{"prompt", "answer"}` or `{"question", "answer"}` records (both with
            optional `group`, `id` and distractors `wrong`, TOFU's `perturbed_answer`), or ConceptVectors' JSON with
            the paper's prompts.
        tokenizer: The tokenizer of the pair.
        scoring: `answer` scores every answer token at the position that predicts it; `notebook` is the released
            notebooks' protocol with its flaws, for replication.
        template: Wrapping of a question, with `{question}`. By default `Question: {question}\nAnswer:`.
        chat: Wrap questions by the tokenizer's chat template instead.
        answers: `given` takes the file's answers, `base` replaces them by greedy continuations of `answers_from`.
        answers_from: The model that answers prompts without an answer, usually `pair.base`.
        max_new_tokens: Length of its continuations, in tokens.
        limit: Use only the first N prompts.

    Returns:
        The prompts, in the order of the file.

    Raises:
        InputError: The file cannot be read (the message names the line), a record lacks a field or has an empty
            answer, the template has no `{question}`, the tokenizer has no chat template, or answers are missing and
            no model is given.

    Examples:
        >>> from dissect import load_pair, load_prompts
        >>> from dissect.zoo import question_set
        >>> pair = load_pair("demo:base", "demo:npo")
        >>> prompts = load_prompts(question_set("forget"), pair.tokenizer, limit=4)
        >>> len(prompts), prompts.scoring
        (4, 'answer')
        >>> prompts.items[0].n_answer_tokens == len(prompts.items[0].scored)
        True
    """
    if template is not None and "{question}" not in template:
        raise InputError(f"`template` must contain {{question}}, got {template!r}")
    if chat and template is not None:
        raise InputError("`chat` and `template` both wrap the question; give only one of them")
    check_at_least("max_new_tokens", max_new_tokens, 1)
    if limit is not None:
        check_at_least("limit", limit, 1)
    if scoring == "notebook":
        if chat or template is not None:
            raise InputError("`scoring` notebook has its own prompt; leave out `chat` and `template`")
        raw = list(questions(read_records(path), path, NOTEBOOK_TEMPLATE, None, verbatim_rows=answers == "given"))
        return notebook_prompts(raw[:limit], tokenizer, str(path), answers_from, max_new_tokens)
    wrap = chat_format(tokenizer) if chat else None
    raw = list(questions(read_records(path), path, template, wrap, verbatim_rows=False))[:limit]
    texts = _answered(raw, tokenizer, answers, answers_from, max_new_tokens, chat=chat)
    items = []
    for question, answer in zip(raw, texts, strict=True):
        try:
            span = encode_answer(tokenizer, question.prompt, answer, chat=wrap)
        except InputError as error:
            raise InputError(f"{path}, prompt {question.id}: {error}") from None
        if span.answer_start == 0:
            raise InputError(
                f"{path}, prompt {question.id}: the prompt is empty, so that no position predicts the answer"
            )
        items.append(
            Prompt(
                id=question.id,
                group=question.group,
                prompt=question.prompt,
                answer=answer,
                input_ids=tuple(span.input_ids),
                answer_start=span.answer_start,
                scored=range(span.answer_start - 1, len(span.input_ids) - 1),
                wrong=tuple(
                    (text, tuple(encode_answer(tokenizer, question.prompt, text, chat=wrap).input_ids))
                    for text in question.wrong
                ),
            )
        )
    return Prompts(items=tuple(items), scoring="answer", pad_token_id=_pad_token(tokenizer), source=str(path))


def _answered(
    raw: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    answers: Literal["given", "base"],
    model: "Model | None",
    max_new_tokens: int,
    *,
    chat: bool,
) -> list[str]:
    open_questions = [i for i, question in enumerate(raw) if answers == "base" or question.answer is None]
    texts = [question.answer or "" for question in raw]
    if not open_questions:
        return texts
    if model is None:
        raise InputError(
            f"prompt {raw[open_questions[0]].id} has no answer; add answers, or give a model as `answers_from`"
        )
    check_in_memory(model, "generating answers")
    from unlearning.evaluation.generation import greedy_answers

    prompts = [raw[i].prompt for i in open_questions]
    continuations = greedy_answers(
        model.hf, tokenizer, prompts, max_new_tokens=max_new_tokens, add_special_tokens=not chat
    )
    for i, continuation in zip(open_questions, continuations, strict=True):
        texts[i] = cut_continuation(continuation)
        if not texts[i]:
            raise InputError(f"prompt {raw[i].id}: {model.name} gives an empty answer to {raw[i].prompt[-60:]!r}")
    return texts


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    # Any token id is right: padded positions are masked out and never scored.
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
