"""Tokenise as the released notebooks do, for replication."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from dissect.prompts.prompts import Prompt, Prompts, check_in_memory
from dissect.prompts.records import Question
from unlearning.common.errors import InputError

if TYPE_CHECKING:
    from dissect.models.model import Model


def notebook_prompts(
    raw: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    model: "Model | None",
    max_new_tokens: int,
) -> Prompts:
    """Tokenise questions by the protocol of the released notebooks, flaws included.

    Args:
        raw: The questions, with the released rows and lengths where the file has them.
        tokenizer: The tokenizer of the pair.
        source: The file's name, for messages.
        model: The model that answers the questions of groups without released rows; None to refuse these.
        max_new_tokens: Length of its answers, in tokens.

    Returns:
        The prompts, with the last n positions of each row scored.

    Raises:
        InputError: The tokenizer has no end-of-sequence token, rows are missing and no model is given, or a row is
            shorter than its answer.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("`scoring` notebook pads with the end-of-sequence token, and the tokenizer has none")
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(raw):
        groups.setdefault(question.group, []).append(index)
    rows = {i: question.row for i, question in enumerate(raw)}
    lengths = {i: question.n_answer_tokens for i, question in enumerate(raw)}
    for indices in groups.values():
        if all(rows[i] is not None and lengths[i] is not None for i in indices):
            continue
        if model is None:
            raise InputError(
                f"{source}, prompt {raw[indices[0]].id}: no QA_with_answers and answers_tokens_num to replicate; set "
                "`answers` to base, and the base model answers every prompt"
            )
        prompts = [raw[i].prompt for i in indices]
        for i, (text, n_tokens) in zip(
            indices, _notebook_continuations(model, tokenizer, prompts, max_new_tokens), strict=True
        ):
            rows[i] = text
            lengths[i] = n_tokens
    items = []
    for index, question in enumerate(raw):
        row, n = rows[index], lengths[index]
        assert row is not None and n is not None
        ids = tokenizer(row)["input_ids"]
        if not 1 <= n <= len(ids):
            raise InputError(
                f"{source}, prompt {question.id}: by the notebooks' rule its answer has {n} of the row's {len(ids)} "
                "tokens (answers_tokens_num); remove the question or set `scoring` to answer"
            )
        start = len(ids) - n
        items.append(
            Prompt(
                id=question.id,
                group=question.group,
                prompt=str(tokenizer.decode(ids[:start])),
                answer=str(tokenizer.decode(ids[start:])),
                input_ids=tuple(ids),
                answer_start=start,
                scored=range(start, len(ids)),
            )
        )
    return Prompts(items=tuple(items), scoring="notebook", pad_token_id=eos, source=source)


def _notebook_continuations(
    model: "Model", tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[tuple[str, int]]:
    """Return rows and answer lengths as the released notebooks make them, from one left-padded batch.

    The notebooks' length rule counts end-of-sequence tokens over the whole row and pads with the same token, so that
    it subtracts every left pad from the answer: n = row length - count(row == eos) - input length.
    """
    check_in_memory(model, "generating answers")
    eos = tokenizer.eos_token_id
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.tensor([[eos] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    with torch.inference_mode():
        generate: Any = model.hf.generate
        output = generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens
        )
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [(text, output.shape[1] - int((row == eos).sum()) - width) for text, row in zip(texts, output, strict=True)]
