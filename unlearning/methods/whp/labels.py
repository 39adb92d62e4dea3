"""Generic labels: for every token of the target text, what a model that never read the text would expect next.

    v_generic(t) = v_base(T', t') - alpha ReLU(v_reinforced(T, t) - v_base(T', t')),    label(t) = argmax v_generic(t)

T is a block of the text, T' its translation, and v the logits. Position t' of T' predicts the token that is aligned
with the token that t predicts. Tokens that the reinforced model (the base trained further on the text) raises are what
the text taught; a model that sees T' expects the generic counterpart of every name. Two rules keep a block consistent:
(i) the second and later occurrences of an anchor have no label, because the context in T still shows the anchor; (ii)
the first tokens of the counterparts of anchors already seen are lowered, because T' shows them and the base would copy
them.

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

from unlearning.common.context import context_of
from unlearning.common.errors import InputError
from unlearning.methods.whp.anchors import Anchors
from unlearning.methods.whp.blocks import Block, Reason, Use, cut_blocks

IGNORED = -100
"""Target of a position without a label, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class LabelOptions:
    """Options of the labels.

    Attributes:
        alpha: Weight of the ReLU term.
        relu_baseline: Text on which the base's logits inside the ReLU are computed.
        seen_penalty: Amount of rule (ii), in logits.
        block_size: Maximum number of tokens of a block.
    """

    alpha: float = 5.0
    relu_baseline: Literal["translated", "original"] = "translated"
    seen_penalty: float = 5.0
    block_size: int = 512


@dataclass(frozen=True)
class LabelledBlock:
    """A block of the original text with its labels.

    Attributes:
        input_ids: The tokens of the original text.
        targets: At position t the label of the prediction made there, in place of token t + 1; `IGNORED` without a
            label, and at the last position.
        reasons: At position t the reason why there is no label; "" with a label, "end" at the last position.
        anchors: At position t the anchor that token t + 1 belongs to, or "".
    """

    input_ids: tuple[int, ...]
    targets: tuple[int, ...]
    reasons: tuple[Reason | Literal["end"], ...]
    anchors: tuple[str, ...]

    @property
    def mask(self) -> tuple[bool, ...]:
        """For each position whether its prediction has a label."""
        return tuple(target != IGNORED for target in self.targets)

    @property
    def changed(self) -> tuple[bool, ...]:
        """For each position whether the label of its prediction differs from the text's next token."""
        following = (*self.input_ids[1:], IGNORED)
        return tuple(t not in (IGNORED, token) for t, token in zip(self.targets, following, strict=True))


@dataclass(frozen=True)
class LabelCounts:
    """Counts over the labels of a text.

    Attributes:
        blocks: Number of blocks.
        tokens: Number of tokens.
        labels: Number of predictions with a label.
        changed: Number of labels that differ from the text's own next token.
        masked: Number of predictions without a label, by reason.
        anchors: Number of entries of the dictionary.
        anchors_found: Number of entries that occur in the text.
        occurrences: Number of occurrences of anchors.
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
        """Return the counts as one sentence."""
        masked = ", ".join(f"{count} {reason}" for reason, count in self.masked.items()) or "none"
        return (
            f"{self.anchors_found} of {self.anchors} anchors found, {self.occurrences} times; {self.labels} labels in "
            f"{self.blocks} blocks, {self.changed} differ from the text; without a label: {masked}"
        )


@dataclass(frozen=True)
class Labels:
    """The labels of a text and how they were made.

    Attributes:
        blocks: The labelled blocks, in the order of the text.
        counts: Their counts.
        options: The options.
        generics: The anchor dictionary.
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
    """Compute base - alpha ReLU(reinforced - baseline), in float32 or wider.

    Args:
        base: Logits of the base model on T', at the aligned positions.
        reinforced: Logits of the reinforced model on T.
        baseline: Logits that the reinforced model's are compared with; None takes `base`, as the paper does.
        alpha: Weight of the ReLU term; 0 returns `base`.

    Returns:
        The generic logits.
    """
    if base.dtype in (torch.float16, torch.bfloat16):
        base = base.float()
    baseline = base if baseline is None else baseline.to(base.dtype)
    return base - alpha * torch.relu(reinforced.to(base.dtype) - baseline)


def lower_seen(
    logits: Float[Tensor, "position vocab"], positions: Int[Tensor, " position"], uses: Sequence[Use], *, amount: float
) -> Float[Tensor, "position vocab"]:
    """Apply rule (ii): subtract `amount` from the first tokens of counterparts whose anchors have been seen.

    Args:
        logits: Rows of a block.
        positions: Position in T of each row.
        uses: First uses of the block's anchors. Each counts from the last token of the anchor on, and a token that
            several counterparts begin with is lowered once.
        amount: Amount in logits.

    Returns:
        The lowered logits; the argument itself if the block has no anchors.
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

    The labels do not depend on the batch size: batches are padded on the right, and masks come from lengths. The logits
    of one batch of blocks are in memory at a time.

    Args:
        base: The reference model, before unlearning.
        reinforced: The model trained further on the text.
        tokenizer: Tokenizer of both.
        texts: The text to forget.
        anchors: The anchor dictionary.
        options: Options of the labels; None takes the defaults.
        batch_size: Blocks per forward pass.
        progress: Show a progress bar.

    Returns:
        The labels and their counts.

    Raises:
        InputError: The dictionary changes nothing, the models have different vocabularies, the tokenizer belongs to
            another model, a block is longer than the models' context, logits are not finite, or `cut_blocks` refuses
            the texts.
    """
    options = options or LabelOptions()
    _check_models(base, reinforced, options.block_size)
    blocks = cut_blocks(tokenizer, texts, anchors, block_size=options.block_size)
    _check_vocabulary(base, blocks)
    # Batches of blocks of similar length need little padding.
    order = sorted(range(len(blocks)), key=lambda index: len(blocks[index].source))
    labelled: dict[int, LabelledBlock] = {}
    training = base.training, reinforced.training
    base.eval(), reinforced.eval()
    try:
        with Progress(console=Console(stderr=True), disable=not progress) as bar, torch.no_grad():
            task = bar.add_task("generic labels", total=len(blocks))
            for first in range(0, len(order), batch_size):
                indices = order[first : first + batch_size]
                batch = _label_batch(base, reinforced, [blocks[index] for index in indices], options)
                labelled.update(zip(indices, batch, strict=True))
                bar.advance(task, len(indices))
    finally:
        base.train(training[0])
        reinforced.train(training[1])
    in_order = [labelled[index] for index in range(len(blocks))]
    return Labels(in_order, _count(blocks, in_order, anchors), options, dict(anchors.generics))


def _label_batch(
    base: PreTrainedModel, reinforced: PreTrainedModel, blocks: Sequence[Block], options: LabelOptions
) -> Iterator[LabelledBlock]:
    on_target = _logits(base, [block.target for block in blocks])
    on_source = _logits(reinforced, [block.source for block in blocks])
    baseline = _logits(base, [block.source for block in blocks]) if options.relu_baseline == "original" else None
    for row, block in enumerate(blocks):
        # A token is predicted at the position before it, in T and in T' alike.
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
    limit = context_of(base)
    if limit is not None and block_size > limit:
        raise InputError(f"`block_size` must be at most {limit}, the model's context, got {block_size}")


def _check_vocabulary(model: PreTrainedModel, blocks: Sequence[Block]) -> None:
    size = int(model.config.get_text_config().vocab_size)
    largest = max(max(*block.source, *block.target) for block in blocks)
    if largest >= size:
        raise InputError(
            f"the tokenizer gives token {largest}, the model has {size}; use the tokenizer that belongs to the model"
        )
