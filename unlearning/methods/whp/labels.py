"""Generic labels: what a model that never read the target text would expect next, for every token of it.

    v_generic(t) = v_base(T', t') - alpha ReLU(v_reinforced(T, t) - v_base(T', t')),    label(t) = argmax v_generic(t)

T is a block of the text, T' its translation, t' the position of T' that predicts the token aligned with the one that t
predicts. What the reinforced model (the base trained further on the text) raises is what the text taught; a model that
sees T' expects the generic counterpart of every name. Two rules keep a block consistent: (i) the second and later
occurrences of an anchor have no label, because the context in T still shows the anchor; (ii) the first tokens of the
counterparts of anchors already seen are lowered, because T' shows them and the base would copy them.

Source: Who's Harry Potter, arXiv 2310.02238; the amount of rule (ii), which the paper does not give, is that of
UCSB-NLP-Chang/causal_unlearn.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.blocks import Block, Reason, Use, cut_blocks
from unlearning.options import option

IGNORED = -100
"""The target of a position without a label, as `torch.nn.functional.cross_entropy` has it."""


@dataclass(frozen=True)
class LabelOptions:
    """How labels are made."""

    alpha: float = option(5.0, "how far what the text taught is pushed down", source="WHP 2310.02238", minimum=0)
    relu_baseline: Literal["translated", "original"] = option(
        "translated", "text on which the base's logits inside the ReLU are taken", source="WHP 2310.02238"
    )
    seen_penalty: float = option(
        5.0, "subtracted from the logits of counterparts already used", source="causal_unlearn 2407.16997", minimum=0
    )
    block_size: int = option(512, "tokens of a block", source="WHP 2310.02238", minimum=2)


@dataclass(frozen=True)
class LabelledBlock:
    """A block of the original text, with what to train its predictions towards.

    Attributes:
        input_ids: the tokens of the original text.
        targets: at position t the label of the prediction made there, in the place of token t + 1; `IGNORED` where
            there is none, and at the last position.
        reasons: at position t why there is no label; "" where there is one, "end" at the last position.
        anchors: at position t the anchor that token t + 1 belongs to, or "".
    """

    input_ids: tuple[int, ...]
    targets: tuple[int, ...]
    reasons: tuple[Reason | Literal["end"], ...]
    anchors: tuple[str, ...]

    @property
    def mask(self) -> tuple[bool, ...]:
        """Whether the prediction made at each position has a label."""
        return tuple(target != IGNORED for target in self.targets)

    @property
    def changed(self) -> tuple[bool, ...]:
        """Whether the label of the prediction made at each position is another token than the text's."""
        following = (*self.input_ids[1:], IGNORED)
        return tuple(t not in (IGNORED, token) for t, token in zip(self.targets, following, strict=True))


@dataclass(frozen=True)
class LabelCounts:
    """What the labels of a text come to.

    Attributes:
        blocks, tokens: how much text there is.
        labels: predictions with a label.
        changed: labels that differ from the text's own next token.
        masked: predictions without a label, by reason.
        anchors: entries of the dictionary.
        anchors_found: those that occur in the text.
        occurrences: how many times an anchor occurs.
    """

    blocks: int
    tokens: int
    labels: int
    changed: int
    masked: dict[str, int]
    anchors: int
    anchors_found: int
    occurrences: int

    def __str__(self) -> str:
        masked = ", ".join(f"{count} {reason}" for reason, count in self.masked.items()) or "none"
        return (
            f"{self.anchors_found} of {self.anchors} anchors found, {self.occurrences} times; {self.labels} labels in "
            f"{self.blocks} blocks, {self.changed} differ from the text; without a label: {masked}"
        )


@dataclass(frozen=True)
class Labels:
    """The labels of a text and how they were made.

    Attributes:
        blocks: in the order of the text.
        counts: what they come to.
        options: as given.
        generics: the anchor dictionary.
    """

    blocks: list[LabelledBlock]
    counts: LabelCounts
    options: LabelOptions
    generics: dict[str, str]


def generic_logits(
    base: Float[Tensor, "position vocab"],
    reinforced: Float[Tensor, "position vocab"],
    baseline: Float[Tensor, "position vocab"] | None = None,
    *,
    alpha: float,
) -> Float[Tensor, "position vocab"]:
    """base - alpha ReLU(reinforced - baseline), in float32 at least.

    Args:
        base: logits of the base model on T', at the aligned positions.
        reinforced: logits of the reinforced model on T.
        baseline: what the reinforced model is compared with; the paper's `base` unless given.
        alpha: 0 leaves `base`.
    """
    if base.dtype in (torch.float16, torch.bfloat16):
        base = base.float()
    baseline = base if baseline is None else baseline.to(base.dtype)
    return base - alpha * torch.relu(reinforced.to(base.dtype) - baseline)


def lower_seen(
    logits: Float[Tensor, "position vocab"], positions: Int[Tensor, " position"], uses: Sequence[Use], *, amount: float
) -> Float[Tensor, "position vocab"]:
    """Rule (ii): subtract `amount` from the first tokens of counterparts whose anchors have been seen.

    Args:
        logits: rows of a block.
        positions: the position in T of each row.
        uses: the block's first uses; each counts from the last token of the anchor on, and a token that several
            counterparts begin with is lowered once.
        amount: in logits.
    """
    since: dict[int, int] = {}
    for use in uses:
        for token in use.first_tokens:
            since[token] = min(use.token, since.get(token, use.token))
    if not since:
        return logits
    tokens = torch.tensor(list(since), device=logits.device)
    first = torch.tensor(list(since.values()), device=logits.device)
    seen = positions.to(logits.device)[:, None] >= first
    return logits.index_add(1, tokens, -amount * seen.to(logits.dtype))


def make_labels(
    base: PreTrainedModel,
    reinforced: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    anchors: Anchors,
    options: LabelOptions | None = None,
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> Labels:
    """Cut the texts into blocks and label every prediction in them.

    Labels do not depend on the batch size: batches are padded on the right, masks come from lengths. The logits of one
    batch of blocks are in memory at a time.

    Raises:
        InputError: a dictionary that changes nothing, models of different vocabularies, a tokenizer of another model,
            blocks longer than the models' context, logits that are not finite; and what `cut_blocks` refuses.
    """
    options = options or LabelOptions()
    _check_models(base, reinforced, options.block_size)
    blocks = cut_blocks(tokenizer, texts, anchors, block_size=options.block_size)
    _check_vocabulary(base, blocks)
    # Blocks of similar length together: little padding.
    order = sorted(range(len(blocks)), key=lambda place: len(blocks[place].source))
    labelled: dict[int, LabelledBlock] = {}
    training = base.training, reinforced.training
    base.eval(), reinforced.eval()
    try:
        with Progress(console=Console(stderr=True), disable=not progress) as bar, torch.no_grad():
            task = bar.add_task("generic labels", total=len(blocks))
            for first in range(0, len(order), batch_size):
                places = order[first : first + batch_size]
                batch = _label_batch(base, reinforced, [blocks[place] for place in places], options)
                labelled.update(zip(places, batch, strict=True))
                bar.advance(task, len(places))
    finally:
        base.train(training[0])
        reinforced.train(training[1])
    in_order = [labelled[place] for place in range(len(blocks))]
    return Labels(in_order, _count(blocks, in_order, anchors), options, dict(anchors.generics))


def _label_batch(
    base: PreTrainedModel, reinforced: PreTrainedModel, blocks: Sequence[Block], options: LabelOptions
) -> Iterator[LabelledBlock]:
    on_target = _logits(base, [block.target for block in blocks])
    on_source = _logits(reinforced, [block.source for block in blocks])
    baseline = _logits(base, [block.source for block in blocks]) if options.relu_baseline == "original" else None
    for row, block in enumerate(blocks):
        # Token i is predicted at position i - 1, and so is the token aligned with it.
        pairs = [
            (token - 1, piece - 1)
            for token, (piece, reason) in enumerate(zip(block.aligned, block.reasons, strict=True))
            if not reason and piece is not None
        ]
        positions = torch.tensor([position for position, _ in pairs], dtype=torch.long)
        aligned = torch.tensor([position for _, position in pairs], dtype=torch.long)
        logits = generic_logits(
            on_target[row, aligned.to(on_target.device)],
            on_source[row, positions.to(on_source.device)].to(on_target.device),
            None if baseline is None else baseline[row, positions.to(baseline.device)],
            alpha=options.alpha,
        )
        if not torch.isfinite(logits).all():
            raise InputError("the logits of the base or the reinforced model are not finite; check their weights")
        labels = lower_seen(logits, positions, block.uses, amount=options.seen_penalty).argmax(dim=1).tolist()
        yield _labelled(block, dict(zip(positions.tolist(), labels, strict=True)))


def _labelled(block: Block, labels: dict[int, int]) -> LabelledBlock:
    return LabelledBlock(
        input_ids=block.source,
        targets=tuple(labels.get(position, IGNORED) for position in range(len(block.source))),
        reasons=(*block.reasons[1:], "end"),
        anchors=(*block.anchors[1:], ""),
    )


def _logits(model: PreTrainedModel, rows: Sequence[tuple[int, ...]]) -> Float[Tensor, "batch position vocab"]:
    lengths = torch.tensor([len(row) for row in rows])
    # The padding's token (0) is never read.
    input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    return model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits


def _count(blocks: Sequence[Block], labelled: Sequence[LabelledBlock], anchors: Anchors) -> LabelCounts:
    reasons = Counter(reason for block in labelled for reason in block.reasons if reason not in ("", "end"))
    return LabelCounts(
        blocks=len(blocks),
        tokens=sum(len(block.source) for block in blocks),
        labels=sum(sum(block.mask) for block in labelled),
        changed=sum(sum(block.changed) for block in labelled),
        masked=dict(sorted(reasons.items())),
        anchors=len(anchors.generics),
        anchors_found=len({anchor for block in blocks for anchor in block.anchors if anchor}),
        occurrences=sum(block.n_occurrences for block in blocks),
    )


def _check_models(base: PreTrainedModel, reinforced: PreTrainedModel, block_size: int) -> None:
    sizes = [int(model.config.get_text_config().vocab_size) for model in (base, reinforced)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the base model has {sizes[0]} tokens, the reinforced model {sizes[1]}; reinforce the base itself"
        )
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and block_size > limit:
        raise InputError(f"block_size={block_size}: the model's context is {limit} tokens; lower block_size")


def _check_vocabulary(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    size = int(model.config.get_text_config().vocab_size)
    largest = max(max(*block.source, *block.target) for block in blocks)
    if largest >= size:
        raise InputError(
            f"the tokenizer gives token {largest}, the model has {size}; use the tokenizer that belongs to the model"
        )
