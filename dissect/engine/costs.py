"""Count the floating-point operations and bytes of a schedule before anything is run.

A multiply-add counts as two operations. Products with weights, attention scores and the head are counted; elementwise
operations are not, so that the count can be compared with a processor's peak rate of matrix multiplication.
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
    """Number of weights that one position is multiplied by, and widths of its activations.

    Attributes:
        n_layers: Number of blocks.
        attn: Weights of the attention's projections in one block.
        query_and_output: Weights of the query and output projections, which are needed only where the attention writes.
        mlp: Weights of the MLP in one block; in a mixture of experts those that one position uses.
        down_proj: Weights of the down projection in one block; 0 in a mixture of experts.
        scores: Width of all heads' queries together.
        head: Weights of the output head.
        d_model: Width of the residual stream.
        d_mlp: Width of the coefficients; `d_model` if the MLP has no down projection.
        vocab: Rows of the output head.
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
        """Return the operations of one forward pass without interventions.

        Args:
            rows: Rows of the batch.
            positions: Padded positions of a row.
            logits_at: Number of positions whose logits are computed; None for all.

        Returns:
            The number of floating-point operations.
        """
        tokens = rows * positions
        block = 2 * tokens * (self.attn + self.mlp) + self.attention_scores(rows, positions)
        return self.n_layers * block + 2 * self.head * (tokens if logits_at is None else logits_at)

    def attention_scores(self, rows: int, positions: int) -> int:
        """Return the operations of one layer's query-key and attention-value products, the masked half included.

        Args:
            rows: Rows of the batch.
            positions: Padded positions of a row.

        Returns:
            The number of floating-point operations.
        """
        return 4 * rows * positions * positions * self.scores


def costs_of(model: Model) -> ModelCosts:
    """Count a model's weights, which need not be in memory."""
    block = block_of(model.hf, model.anatomy, 0)
    config = model.hf.config.get_text_config()
    cfg = model.adapter.cfg
    head = model.hf.get_output_embeddings().weight
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or cfg.d_model // heads)
    return ModelCosts(
        n_layers=model.n_layers,
        attn=_weights(block.attn),
        query_and_output=_weights(block.q_proj) + _weights(block.o_proj),
        mlp=_weights(block.mlp, share_of_experts=share) or _weights(block.whole) - _weights(block.attn),
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
    """Count the entries of a module's matrices; of stacked experts, the share that one position uses."""
    if module is None:
        return 0
    sizes: list[Any] = [p for p in module.parameters() if p.dim() >= 2]
    return round(sum(p.numel() * (share_of_experts if p.dim() == 3 else 1) for p in sizes))


def pass_flops(schedule: Schedule, costs: ModelCosts, batch: Batch, n_targets: int, *, n_sources: int = 1) -> int:
    """Count the operations of one pass over the layers with one batch: the base, every target, and their logits.

    Args:
        schedule: Steps of every layer.
        costs: Sizes of the model.
        batch: Padded prompts.
        n_targets: Number of models that are intervened on.
        n_sources: 2 if the donor needs its own forward pass, else 1.

    Returns:
        The number of floating-point operations.
    """
    rows, positions = batch.input_ids.shape
    scored = len(batch.rows)
    tokens = rows * positions if batch.is_dense else int(batch.attention_mask.sum())
    last = schedule.n_layers - 1
    total = 0
    for layer, steps in enumerate(schedule.layers):
        base = Step(
            parent=0,
            branch=0,
            sites=frozenset(),
            shares_attention=False,
            has_sibling=False,
            needs_all_in=True,
            needs_all_out=layer < last,
        )
        total += n_sources * _step_flops(base, costs, rows, positions, tokens, scored)
        total += n_targets * sum(_step_flops(step, costs, rows, positions, tokens, scored) for step in steps)
        given = [step for step in steps if "mlp_coef" in step.sites and not step.sites & (WHOLE | {"mlp_out"})]
        written = scored if layer == last else tokens
        # Computed once for all branches with the same down projection.
        total += 2 * n_targets * costs.down_proj * written * len({_down_proj_sites(step.weights) for step in given})
    return total + 2 * costs.head * scored * (1 + n_targets * (1 + len(schedule.ends)))


def _down_proj_sites(weights: frozenset[str]) -> frozenset[str]:
    """Return the weight sites that restore, or by a regular expression may restore, the down projection."""
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
        total += 2 * (costs.down_proj or costs.mlp) * written  # experts' down projections are not run alone
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
    """Estimate the largest number of bytes that one pass with these batches holds in addition to the weights.

    These are the branches before and after a layer, the base's activations, the intermediate results of one chunk, and
    the logits that are scored.

    Args:
        schedule: Steps of every layer.
        costs: Sizes of the model.
        batches: Batches of the pass.
        n_targets: Number of models that are intervened on.
        chunk: Number of tokens that go through a block at once.
        itemsize: Bytes of one value.
        n_sources: 2 if the donor needs its own forward pass, else 1.

    Returns:
        The number of bytes.
    """
    tokens = sum(batch.input_ids.numel() for batch in batches)
    widest = max(batch.input_ids.numel() for batch in batches)
    scored = max(len(batch.rows) for batch in batches)
    chunk = max(chunk + chunk // 2, widest)  # `Chunk.n_items` may exceed a chunk by half
    branches = (1 + n_sources + n_targets * schedule.max_branches) * tokens * costs.d_model
    from_base = widest * (4 * costs.d_model + costs.d_mlp)
    in_chunk = chunk * (8 * costs.d_model + 4 * costs.d_mlp)
    logits = (max(chunk, scored) + 8 * scored) * costs.vocab
    return itemsize * (branches + from_base + in_chunk) + 4 * logits
