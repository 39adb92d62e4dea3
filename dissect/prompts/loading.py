"""Load prompts from files and records."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from dissect.prompts.notebook import notebook_prompts
from dissect.prompts.prompts import Prompt, Prompts, Scoring, check_in_memory
from dissect.prompts.records import Question, questions
from unlearning.common.errors import InputError, check_at_least
from unlearning.data.chat import DEFAULT_CHAT_DATE, ChatFormat, chat_format
from unlearning.data.concept_vectors import NOTEBOOK_TEMPLATE, cut_continuation
from unlearning.data.question_answer import check_template, unused_template
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
    chat_date: str = DEFAULT_CHAT_DATE,
    answers: Literal["given", "base"] = "given",
    answers_from: "Model | None" = None,
    max_new_tokens: int = 30,
    limit: int | None = None,
) -> Prompts:
    r"""Read prompts with answers, tokenise them and find the answer positions.

    Args:
        path: A JSON list or JSON lines of `{"prompt", "answer"}` or `{"question", "answer"}` records (both with
            optional `group`, `id` and distractors `wrong`, TOFU's `perturbed_answer`; for other names of the answer see
            `unlearning.data.question_answer.ANSWER_KEYS`), or ConceptVectors' JSON with the paper's prompts.
        tokenizer: The tokenizer of the pair.
        scoring: `answer` scores every answer token at the position that predicts it; `notebook` is the released
            notebooks' protocol with its flaws, for replication.
        template: Wrapping of a question, with `{question}`. By default `Question: {question}\nAnswer:`.
        chat: Wrap questions by the tokenizer's chat template instead.
        chat_date: Date that the chat template writes as today's.
        answers: `given` takes the file's answers, and every record must have one; `base` takes greedy continuations of
            `answers_from` for all prompts, and `source` says so.
        answers_from: The model that answers the prompts for `base`, usually `pair.base`.
        max_new_tokens: Length of its continuations, in tokens.
        limit: Use only the first N prompts.

    Returns:
        The prompts, in the order of the file.

    Raises:
        InputError: The file cannot be read (the message names the line), a record lacks a field or its answer, the
            template has no `{question}`, the chat template is missing or fails, or answers are to be the base's and no
            model is given.

    Warns:
        UserWarning: `template` is not used for some records.

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
    if template is not None:
        check_template(template)
    if chat and template is not None:
        raise InputError("`chat` and `template` both wrap the question; give only one of them")
    check_at_least("max_new_tokens", max_new_tokens, 1)
    if limit is not None:
        check_at_least("limit", limit, 1)
    if scoring == "notebook":
        if chat or template is not None:
            raise InputError("`scoring` notebook has its own prompt; leave out `chat` and `template`")
        given = answers == "given"
        rows = questions(read_records(path), path, NOTEBOOK_TEMPLATE, None, verbatim_rows=given, answers=False)
        model = None if given else _answering(answers_from)
        return notebook_prompts(list(rows)[:limit], tokenizer, _source(path, answers), model, max_new_tokens)
    wrap = chat_format(tokenizer, chat_date) if chat else None
    records = read_records(path)
    if (unused := unused_template(records, template)) is not None:
        warnings.warn(f"{path}: {unused}", stacklevel=2)
    raw = list(questions(records, path, template, wrap, answers=answers == "given"))[:limit]
    if answers == "given":
        texts = [question.answer or "" for question in raw]
    else:
        texts = continuations(raw, tokenizer, _answering(answers_from), max_new_tokens, wrap)
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
    return Prompts(
        items=tuple(items),
        scoring="answer",
        pad_token_id=_pad_token(tokenizer),
        source=_source(path, answers),
        chat=wrap,
    )


def continuations(
    raw: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    model: "Model",
    max_new_tokens: int,
    chat: ChatFormat | None,
) -> list[str]:
    """Let a model answer questions.

    Args:
        raw: The questions.
        tokenizer: The tokenizer of the pair.
        model: The model, usually the base.
        max_new_tokens: Length of the answers, in tokens.
        chat: Chat template that the questions were wrapped in, or None.

    Returns:
        Its greedy continuations, cut as `cut_continuation` does.

    Raises:
        InputError: The model is streamed, or answers nothing.
    """
    check_in_memory(model, "generating answers")
    from unlearning.evaluation.generation import greedy_answers

    prompts = [question.prompt for question in raw]
    said = greedy_answers(model.hf, tokenizer, prompts, max_new_tokens=max_new_tokens, chat=chat)
    texts = [cut_continuation(text) for text in said]
    for question, text in zip(raw, texts, strict=True):
        if not text:
            raise InputError(
                f"prompt {question.id}: {model.name} gives an empty answer to {question.prompt[-60:]!r}; remove it, or "
                "set `answers` to given"
            )
    return texts


def _answering(model: "Model | None") -> "Model":
    if model is None:
        raise InputError("`answers_from` is missing: with `answers` base give the model that answers")
    return model


def _source(path: str | Path, answers: Literal["given", "base"]) -> str:
    """Return the file's name; runs record it."""
    return str(path) if answers == "given" else f"{path} (answers: the base model's own)"


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    # Any token id is right: padded positions are masked out and never scored.
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
