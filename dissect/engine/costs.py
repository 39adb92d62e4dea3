"""What a schedule costs: floating-point operations and bytes, counted before anything is run.

A multiply-add counts as two operations. Products with weights, attention scores and the head are counted, and
nothing elementwise: this is what a machine's matrix-multiplication peak is to be compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dissect.engine.schedule import WHOLE, Schedule, Step
from dissect.models.anatomy import block_of
from dissect.models.model import Model
from dissect.models.sites import is_regex
from dissect.prompts.prompts import Batch


@dataclass(frozen=True)
class ModelCosts:
    """Weights that one position is multiplied by, and the widths of what is kept of it.

    Attributes:
        n_layers: number of blocks.
        attn: weights of the attention's projections.
        query_and_output: those of them that are needed only where the attention writes.
        mlp: weights of the MLP; of a mixture of experts those that one position meets.
        down_proj: weights of the down projection.
        scores: width of all heads' queries together.
        head: weights of the output head.
        d_model: width of the residual stream.
        d_mlp: width of the coefficients, or of the MLP's input where there are none.
        vocab: rows of the head.
    """

    n_layers: int
    attn: int
    query_and_output: int
    mlp: int
    down_proj: int
    scores: int
    head: int
    d_model: int
    d_mlp: int
    vocab: int

    def forward(self, rows: int, positions: int, logits_at: int | None = None) -> int:
        """Operations of one plain forward, with logits at every position unless told at how many."""
        tokens = rows * positions
        block = 2 * tokens * (self.attn + self.mlp) + self.attention_scores(rows, positions)
        return self.n_layers * block + 2 * self.head * (tokens if logits_at is None else logits_at)

    def attention_scores(self, rows: int, positions: int) -> int:
        """Operations of queries times keys and weights times values, the masked half included."""
        return 4 * rows * positions * positions * self.scores


def costs_of(model: Model) -> ModelCosts:
    """Count a model's weights; they need not be in memory."""
    block = block_of(model.hf, model.anatomy, 0)
    config = model.hf.config.get_text_config()
    cfg = model.adapter.cfg
    head = model.hf.get_output_embeddings().weight
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    met = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or cfg.d_model // heads)
    return ModelCosts(
        n_layers=model.n_layers,
        attn=_weights(block.attn),
        query_and_output=_weights(block.q_proj) + _weights(block.o_proj),
        mlp=_weights(block.mlp, share_of_experts=met) or _weights(block.whole) - _weights(block.attn),
        down_proj=_weights(block.down_proj),
        scores=heads * width,
        head=head.numel(),
        d_model=int(cfg.d_model),
        d_mlp=block.down_proj.weight.numel() // int(cfg.d_model)  # type: ignore[operator]
        if block.down_proj is not None
        else int(cfg.d_model),
        vocab=head.shape[0],
    )


def _weights(module: nn.Module | None, *, share_of_experts: float = 1.0) -> int:
    """Entries of a module's matrices; of stacked ones, the share that one position meets."""
    if module is None:
        return 0
    sizes: list[Any] = [p for p in module.parameters() if p.dim() >= 2]
    return round(sum(p.numel() * (share_of_experts if p.dim() == 3 else 1) for p in sizes))


def pass_flops(schedule: Schedule, costs: ModelCosts, batch: Batch, n_targets: int, *, n_sources: int = 1) -> int:
    """Operations of one walk over the layers with one batch: the base, every target, and their logits.

    Args:
        schedule: what is computed.
        costs: of the model.
        batch: what goes through it.
        n_targets: how many models are intervened on.
        n_sources: 1, or 2 where the donor's forward is another one than the base's.
    """
    rows, positions = batch.input_ids.shape
    scored = len(batch.rows)
    tokens = rows * positions if batch.is_dense else int(batch.attention_mask.sum())
    last = schedule.n_layers - 1
    total = 0
    for layer, steps in enumerate(schedule.layers):
        base = Step(0, 0, frozenset(), False, False, needs_all_in=True, needs_all_out=layer < last)
        total += n_sources * _step_flops(base, costs, rows, positions, tokens, scored)
        total += n_targets * sum(_step_flops(step, costs, rows, positions, tokens, scored) for step in steps)
        given = [step for step in steps if "mlp_coef" in step.sites and not step.sites & (WHOLE | {"mlp_out"})]
        written = scored if layer == last else tokens
        # Once for all streams that write with the same down projection.
        total += 2 * n_targets * costs.down_proj * written * len({_writes_with(step.weights) for step in given})
    return total + 2 * costs.head * scored * (1 + n_targets * (1 + len(schedule.ends)))


def _writes_with(weights: frozenset[str]) -> frozenset[str]:
    """What is restored of the down projection, as far as names tell."""
    return frozenset(site for site in weights if site == "value_vectors" or is_regex(site))


def _step_flops(step: Step, costs: ModelCosts, rows: int, positions: int, tokens: int, scored: int) -> int:
    if step.sites & WHOLE:
        return 0
    total = 0
    written = tokens if step.needs_all_out else scored
    if step.computes_attn:
        where_written = rows * positions if step.needs_all_out else scored
        keys = costs.attn - costs.query_and_output
        total += 2 * (keys * rows * positions + costs.query_and_output * where_written)
        total += costs.attention_scores(rows, positions)
    if step.computes_mlp:
        total += 2 * costs.mlp * written
    elif step.restores_down_proj_only:
        total += 2 * costs.down_proj * written
    return total


def pass_bytes(
    schedule: Schedule,
    costs: ModelCosts,
    batches: Sequence[Batch],
    n_targets: int,
    *,
    chunk: int,
    itemsize: int,
    n_sources: int = 1,
) -> int:
    """Most bytes that one walk with these batches holds beside the weights, about.

    The streams before and after a layer, what is taken from the base, what one chunk computes, and the logits that
    are being scored.
    """
    tokens = sum(batch.input_ids.numel() for batch in batches)
    widest = max(batch.input_ids.numel() for batch in batches)
    scored = max(len(batch.rows) for batch in batches)
    chunk = max(chunk + chunk // 2, widest)  # what comes nearest to a chunk may be half more
    streams = (1 + n_sources + n_targets * schedule.max_branches) * tokens * costs.d_model
    from_base = widest * (4 * costs.d_model + costs.d_mlp)
    at_work = chunk * (8 * costs.d_model + 4 * costs.d_mlp)
    logits = (max(chunk, scored) + 8 * scored) * costs.vocab
    return itemsize * (streams + from_base + at_work) + 4 * logits
