"""Gradients summed in float32 over backwards, and over ranks: two gloo processes against one."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from unlearning.objectives.bilevel import combine
from unlearning.objectives.gradients import GradientAccumulator, products, put, sum_over_ranks


def test_a_parameter_in_bfloat16_is_summed_in_float32() -> None:
    """64 micro-batches: against the sum of the very same gradients in float64, and autograd's own sum in bfloat16."""
    torch.manual_seed(0)
    model = nn.Linear(16, 8).bfloat16()
    inputs = torch.randn(64, 4, 16).bfloat16()
    exact = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in model.parameters()]
    for x in inputs:
        terms = torch.autograd.grad((model(x) - 3).square().mean() / 64, list(model.parameters()))
        for total, term in zip(exact, terms, strict=True):
            total += term.double()

    accumulator = GradientAccumulator(model.parameters())
    for x in inputs:
        ((model(x) - 3).square().mean() / 64).backward()
        accumulator.add()
    ours = accumulator.take()
    for x in inputs:
        ((model(x) - 3).square().mean() / 64).backward()

    for parameter, summed, reference in zip(model.parameters(), ours, exact, strict=True):
        assert parameter.grad is not None and summed.dtype == torch.float32
        assert (summed - reference).norm() < 1e-6 * reference.norm()
        assert (parameter.grad - reference).norm() > 1e-3 * reference.norm()


def test_a_float32_gradient_is_handed_over_without_a_copy() -> None:
    model = nn.Linear(3, 2)
    accumulator = GradientAccumulator(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        accumulator.add()
    assert model.weight.grad is not None
    own = model.weight.grad.data_ptr()
    weight, bias = accumulator.take()
    assert weight.data_ptr() == own
    assert torch.equal(weight, torch.full((2, 3), 2.0)) and torch.equal(bias, torch.full((2,), 2.0))
    assert model.weight.grad is None and model.bias.grad is None
    model(torch.ones(1, 3)).sum().backward()
    accumulator.add()
    assert torch.equal(accumulator.take()[0], torch.ones(2, 3)), "the next sum starts from nothing"
    assert torch.equal(weight, torch.full((2, 3), 2.0)), "and leaves the taken one alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_no_loss_reached_counts_as_zero(dtype: torch.dtype) -> None:
    used, unused = nn.Parameter(torch.ones(2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
    accumulator = GradientAccumulator([used, unused])
    used.sum().backward()
    accumulator.add()
    taken = accumulator.take()
    assert torch.equal(taken[1], torch.zeros(3)) and torch.equal(taken[0], torch.ones(2))
    put([used, unused], taken)
    assert used.grad is not None and used.grad.dtype == dtype
    assert torch.equal(used.grad, torch.ones(2, dtype=dtype))


def test_products_are_exact_over_several_pieces() -> None:
    """More values than are widened at once, and a sum that float32 would lose: 1 + 2^-30 per value."""
    f, r = torch.ones(3 * 2**16 + 5), torch.full((3 * 2**16 + 5,), 1.0)
    r[0] = 2.0**-30
    n = f.numel()
    assert products([f, f[:2]], [r, r[:2]]).tolist() == [
        [n, n - 1 + 2.0**-30, n - 1 + 2.0**-60],
        [2, 1 + 2.0**-30, 1 + 2.0**-60],
    ]


def test_alone_there_is_nothing_to_sum_over() -> None:
    gradient = torch.ones(2)
    sum_over_ranks([gradient])
    assert torch.equal(gradient, torch.ones(2))


# Two processes. Each rank sees half of every micro-batch; the losses are normalised by all rows of the window.

ROWS = 8


def build_network() -> nn.Sequential:
    """Blocks with numbers; the last one has fewer rows than there are ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def window_gradients(
    model: nn.Module, rows: slice, names: list[str], scope: str, *, factor: int = 1
) -> tuple[list[Tensor], list[float]]:
    """BLUR's direction of a window of two micro-batches, from these rows of each; `factor` undoes an engine's mean."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 2, ROWS, 4, generator=generator)
    accumulator = GradientAccumulator(model.parameters())
    sums = []
    for side, data in enumerate(inputs):
        for micro in data:
            (factor * (model(micro[rows]) - side).square().sum() / (2 * ROWS)).backward()
            accumulator.add()
        sums.append(accumulator.take())
    sum_over_ranks([*sums[0], *sums[1]])
    d, report = combine(sums[0], sums[1], names=names, gamma=1.5, scope=scope)  # type: ignore[arg-type]
    put(model.parameters(), d)
    return [parameter.grad for parameter in model.parameters()], [  # type: ignore[misc]
        report.forget_grad_norm,
        report.retain_grad_norm,
        report.cosine or 0.0,
        report.xi or 0.0,
        report.xi_min or 0.0,
        report.forget_progress or 0.0,
    ]


def work(rank: int, port: int, out: str) -> None:
    """One rank: the direction as DDP and as FSDP2 hold their parameters, in the global and the layer scope."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    names = [name for name, _ in build_network().named_parameters()]
    found = {}
    for scope in ("global", "layer"):
        wrapped = DistributedDataParallel(build_network())
        with wrapped.no_sync():
            found["ddp", scope] = window_gradients(wrapped, rows, names, scope)

        sharded = build_network()
        mesh = init_device_mesh("cpu", (2,))
        for layer in (*sharded, sharded):
            if isinstance(layer, (nn.Linear, nn.Sequential)):
                fully_shard(layer, mesh=mesh)
        gradients, numbers = window_gradients(sharded, rows, names, scope, factor=2)
        assert all(isinstance(gradient, DTensor) for gradient in gradients)
        assert {gradient.to_local().shape[0] for gradient in gradients[-2:]} == {1 - rank}
        found["fsdp", scope] = [gradient.full_tensor() for gradient in gradients], numbers
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_direction_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    names = [name for name, _ in build_network().named_parameters()]
    for scope in ("global", "layer"):
        alone, numbers = window_gradients(build_network(), slice(None), names, scope)
        assert numbers[-1] == pytest.approx(1.5, rel=1e-5)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}.pt")
            for engine in ("ddp", "fsdp"):
                gradients, of_rank = found[engine, scope]
                torch.testing.assert_close(gradients, alone, rtol=1e-5, atol=1e-6)
                assert of_rank == pytest.approx(numbers, rel=1e-5)
