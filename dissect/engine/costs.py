"""Count the floating-point operations and bytes of a schedule before anything is run.

A multiply-add counts as two operations. Products with weights, attention scores and the head are counted; elementwise
operations are not, so that the count can be compared with a processor's peak rate of matrix multiplication. Nor are the
scans of state-space parts (Falcon H1) and the products by which an indexer chooses keys (GLM 5).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dissect.engine.schedule import WHOLE, Schedule, Step
from dissect.models.anatomy import Block, block_of
from dissect.models.experts import feed_forward, is_below, shares_of_experts
from dissect.models.model import Model
from dissect.models.sites import is_regex
from dissect.prompts.prompts import Batch


@dataclass(frozen=True)
class LayerCosts:
    """Number of weights of one block that one position is multiplied by, and widths of its activations.

    Attributes:
        attn: Weights of the attention's projections.
        query_and_output: Weights of the query and output projections, which are needed only where the attention writes.
        mlp: Weights of everything beside the attention; of a mixture's experts those that one position uses.
        down_proj: Weights of the down projection; 0 in a mixture of experts.
        scores: Mean of the widths of all heads' queries together and of all their values together.
        d_mlp: Width of the coefficients; in a mixture of all that one position uses.
    """

    attn: int
    query_and_output: int
    mlp: int
    down_proj: int
    scores: int
    d_mlp: int

    def attention_scores(self, rows: int, positions: int) -> int:
        """Return the operations of the query-key and attention-value products, the masked half included.

        Args:
            rows: Rows of the batch.
            positions: Padded positions of a row.

        Returns:
            The number of floating-point operations.
        """
        return 4 * rows * positions * positions * self.scores


@dataclass(frozen=True)
class ModelCosts:
    """Costs of a model's blocks and of what stands behind them.

    Attributes:
        layers: Costs of every block.
        before: Weights of what is computed before the blocks; embeddings are looked up.
        head: Weights of the output head, and of what stands between it and the blocks.
        d_model: Width of the residual stream.
        vocab: Rows of the output head.
    """

    layers: tuple[LayerCosts, ...]
    before: int
    head: int
    d_model: int
    vocab: int

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def d_mlp(self) -> int:
        """Width of the coefficients in the widest block."""
        return max(layer.d_mlp for layer in self.layers)

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
        blocks = sum(
            2 * tokens * (layer.attn + layer.mlp) + layer.attention_scores(rows, positions) for layer in self.layers
        )
        return blocks + 2 * self.before * tokens + 2 * self.head * (tokens if logits_at is None else logits_at)


def costs_of(model: Model) -> ModelCosts:
    """Count a model's weights layer by layer, since layers may differ; they need not be in memory."""
    head = model.hf.get_output_embeddings().weight
    tables = {id(module.weight) for module in model.hf.modules() if isinstance(module, nn.Embedding)} - {id(head)}
    matrices = {name: p for name, p in model.hf.named_parameters() if _is_matrix(name, p) and id(p) not in tables}
    outside = {name: p for name, p in matrices.items() if not is_below(name, model.anatomy.blocks) and p is not head}
    before = sum(p.numel() for name, p in outside.items() if name in model.weights.before)
    return ModelCosts(
        layers=tuple(_layer_costs(model, block_of(model.hf, model.anatomy, layer)) for layer in range(model.n_layers)),
        before=before,
        head=head.numel() + sum(p.numel() for p in outside.values()) - before,
        d_model=int(model.adapter.cfg.d_model),
        vocab=head.shape[0],
    )


def _layer_costs(model: Model, block: Block) -> LayerCosts:
    d_model, attn = int(model.adapter.cfg.d_model), model.anatomy.attn
    config = model.hf.config.get_text_config()
    shares, sites = shares_of_experts(block.whole, config, d_model), feed_forward(block.whole, attn, d_model).sites
    used = {
        name: round(p.numel() * shares.get(name, 1))
        for name, p in block.whole.named_parameters()
        if _is_matrix(name, p)
    }
    in_attn = sum(n for name, n in used.items() if is_below(name, attn))
    down_proj = _weights(block.down_proj)
    coefficients = down_proj or sum(n for name, n in used.items() if sites.get(name) == "value_vectors")
    return LayerCosts(
        attn=in_attn,
        query_and_output=_weights(block.q_proj) + _weights(block.o_proj),
        mlp=sum(used.values()) - in_attn,
        down_proj=down_proj,
        scores=_width_of_scores(block, config, d_model),
        d_mlp=coefficients // d_model or d_model,
    )


def _width_of_scores(block: Block, config: Any, d_model: int) -> int:
    """Return the mean width of queries and values; those of a multi-latent attention differ."""
    heads = int(config.num_attention_heads)
    head = getattr(block.attn, "head_dim", None) or getattr(config, "head_dim", None) or d_model // heads
    o_proj = next((p for p in block.o_proj.parameters() if p.dim() == 2), None) if block.o_proj is not None else None
    values = heads * int(head) if o_proj is None else o_proj.numel() // d_model
    latent = getattr(block.attn, "qk_head_dim", None)
    return values if latent is None else (values + heads * int(latent)) // 2


def _weights(module: nn.Module | None) -> int:
    """Count the entries of a module's matrices."""
    return 0 if module is None else sum(p.numel() for name, p in module.named_parameters() if _is_matrix(name, p))


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return True if states are multiplied by a parameter; biases of stacked experts have two dimensions as well."""
    return parameter.dim() >= 2 and "bias" not in name.rpartition(".")[2]


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
    for layer, (steps, of_layer) in enumerate(zip(schedule.layers, costs.layers, strict=True)):
        base = Step(
            parent=0,
            branch=0,
            sites=frozenset(),
            shares_attention=False,
            has_sibling=False,
            needs_all_in=True,
            needs_all_out=layer < last,
        )
        total += n_sources * _step_flops(base, of_layer, rows, positions, tokens, scored)
        total += n_targets * sum(_step_flops(step, of_layer, rows, positions, tokens, scored) for step in steps)
        given = [step for step in steps if "mlp_coef" in step.sites and not step.sites & (WHOLE | {"mlp_out"})]
        written = scored if layer == last else tokens
        # Computed once for all branches with the same down projection.
        total += 2 * n_targets * of_layer.down_proj * written * len({_down_proj_sites(step.weights) for step in given})
    return total + 2 * costs.head * scored * (1 + n_targets * (1 + len(schedule.ends)))


def _down_proj_sites(weights: frozenset[str]) -> frozenset[str]:
    """Return the weight sites that restore, or by a regular expression may restore, the down projection."""
    return frozenset(site for site in weights if site == "value_vectors" or is_regex(site))


def _step_flops(step: Step, costs: LayerCosts, rows: int, positions: int, tokens: int, scored: int) -> int:
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
