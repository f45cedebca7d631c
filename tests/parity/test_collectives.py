"""Law adjoint: each collective's backward is its transpose, <A x, y> == <x, A* y>."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensorpar
from tensorpar import collectives, messages
from tensorpar.collectives import (
    all_gather,
    all_gather_region,
    all_reduce,
    copy_region,
    gather_region,
    reduce_region,
    reduce_region_,
    reduce_scatter_region,
    scatter_region,
)
from tensorpar.partition import chunk_bounds, chunk_sizes
from tests.pool import Pool

Shape = tuple[int, ...]
#: forward, whether its input and its output are the same on all ranks, and its conjugate.
REGIONS = {
    "copy": (True, False, "reduce"),
    "reduce": (False, True, "copy"),
    "scatter": (True, False, "gather"),
    "gather": (False, True, "scatter"),
    # whole on all ranks, but not for the same purpose on each
    "all_gather": (False, False, "reduce_scatter"),
    "reduce_scatter": (False, False, "all_gather"),
}


def _apply(region: str, x: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    mesh = tensorpar.tp_mesh()
    if region == "copy":
        return copy_region(x, mesh)
    if region == "reduce":
        return reduce_region(x, mesh)
    if region in ("scatter", "reduce_scatter"):
        return (scatter_region if region == "scatter" else reduce_scatter_region)(x, dim, mesh)
    return (gather_region if region == "gather" else all_gather_region)(x, dim, size, mesh)


def _draw(seed: int, shape: Shape, *, common: bool) -> torch.Tensor:
    own = 0 if common else 1 + tensorpar.tp_rank()
    generator = torch.Generator().manual_seed(100 * seed + own)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _shapes(region: str, shape: Shape, dim: int) -> tuple[Shape, Shape]:
    """This rank's shapes of the input and the output."""
    own = chunk_sizes(shape[dim], tensorpar.tp_size())[tensorpar.tp_rank()]
    chunk = (*shape[:dim], own, *shape[dim + 1 :])
    if "scatter" in region:
        return shape, chunk
    return (chunk, shape) if "gather" in region else (shape, shape)


def forward_and_backward(region: str, shape: Shape, dim: int) -> dict[str, torch.Tensor]:
    """x, A x, y, A* y and the gradient of <A* y, z> with respect to y, which is A z."""
    in_common, out_common, _ = REGIONS[region]
    in_shape, out_shape = _shapes(region, shape, dim)
    x = _draw(1, in_shape, common=in_common).requires_grad_()
    y = _draw(2, out_shape, common=out_common).requires_grad_()
    z = _draw(3, in_shape, common=in_common)
    before = x.detach().clone()
    Ax = _apply(region, x, dim, shape[dim])
    (Aty,) = torch.autograd.grad(Ax, x, y, create_graph=True)
    (Az,) = torch.autograd.grad(Aty, y, z)
    assert torch.equal(x, before)
    found = {"x": x, "Ax": Ax, "y": y, "Aty": Aty, "z": z, "Az": Az}
    found["Az directly"] = _apply(region, z, dim, shape[dim])
    return {name: value.detach().clone() for name, value in found.items()}


def _inner(results: list[Any], a: str, b: str, *, common: bool) -> float:
    """The inner product over the world; what is common counts once."""
    return sum((one[a] * one[b]).sum().item() for one in (results[:1] if common else results))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("region", REGIONS)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), data=st.data())
def test_backward_is_the_transpose(ranks: Pool, region: str, size: int, shape: Shape, data: Any):
    """For any shape, dim and uneven chunk, <A x, y> == <x, A* y>, and twice backward is A again."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    results = ranks(size).run(forward_and_backward, region, shape, dim)
    in_common, out_common, _ = REGIONS[region]
    for name in ("Ax", "Az") if out_common else ("Aty",) if in_common else ():
        assert all(torch.equal(one[name], results[0][name]) for one in results)
    left = _inner(results, "Ax", "y", common=out_common)
    right = _inner(results, "x", "Aty", common=in_common)
    assert left == pytest.approx(right, abs=1e-10)
    for one in results:
        torch.testing.assert_close(one["Az"], one["Az directly"])


def round_trips(size: int) -> dict[str, bool]:
    """Compositions that must be identities."""
    mesh, num_ranks = tensorpar.tp_mesh(), tensorpar.tp_size()
    common = _draw(1, (3, size, 2), common=True)
    transposed = common.transpose(0, 1)  # not contiguous
    start, stop = chunk_bounds(size, num_ranks, tensorpar.tp_rank())
    found = {
        "gather(scatter)": torch.equal(
            gather_region(scatter_region(common, 1, mesh), 1, size, mesh), common
        ),
        "of a view": torch.equal(
            gather_region(scatter_region(transposed, 0, mesh), 0, size, mesh), transposed
        ),
        "scatter is a slice": torch.equal(scatter_region(common, 1, mesh), common[:, start:stop]),
        "reduce(copy)": torch.allclose(reduce_region(common, mesh), num_ranks * common),
        "whole numbers": torch.equal(
            all_gather(torch.arange(start, stop), 0, size, mesh), torch.arange(size)
        ),
        "maximum": int(
            all_reduce(torch.tensor(tensorpar.tp_rank()), mesh, torch.distributed.ReduceOp.MAX)
        )
        == num_ranks - 1,
    }
    wide = _draw(5, (5, 2, size), common=True).transpose(0, 1)
    with mock.patch.object(messages, "_BLOCK_BYTES", 3 * 8 * chunk_sizes(size, num_ranks)[0]):
        found["in blocks of rows"] = torch.equal(
            all_gather(wide[..., start:stop], 2, size, mesh), wide
        )
    plain = _draw(4, (5, 4), common=False)
    before = plain.clone()
    all_reduce(plain.t(), mesh)
    found["input untouched"] = torch.equal(plain, before)
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 9])
def test_conjugates_undo_each_other(ranks, world, size):
    """Scatter then gather is the identity, for views and empty chunks too."""
    for found in ranks(world).run(round_trips, size):
        assert all(found.values()), found


def in_place() -> dict[str, bool]:
    """A temporary, one with strides, and one that autograd follows."""
    mesh = tensorpar.tp_mesh()
    term = torch.full((2, 3), 1.0 + tensorpar.tp_rank())
    total = float(sum(range(1, mesh.size() + 1)))
    whole = torch.full((2, 3), total)
    summed = reduce_region_(term, mesh)
    strided = torch.full((3, 2), 1.0 + tensorpar.tp_rank()).T
    x = torch.ones(2, 3, requires_grad=True)
    followed = reduce_region_(x * 2, mesh)
    followed.square().sum().backward()
    return {
        "sum": torch.equal(summed, whole),
        "same memory": summed.data_ptr() == term.data_ptr(),
        "strided": torch.equal(reduce_region_(strided, mesh), whole),
        "gradient": torch.equal(x.grad, torch.full((2, 3), 2 * 2 * 2.0 * mesh.size())),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_the_sum_may_take_the_place_of_a_term(ranks, size):
    """`reduce_region_` copies nothing, and its gradient is that of `reduce_region`."""
    for found in ranks(size).run(in_place):
        assert all(found.values()), found


def reduced_by_messages(num: int, transposed: bool) -> tuple[int, list[torch.Tensor]]:
    """How often torch's all-reduce is called for four reductions of `num` float32, and these."""
    x = _draw(1, (num // 4, 4), common=False).float()
    x = x.T if transposed else x
    mesh = tensorpar.tp_mesh()
    real = collectives.dist.all_reduce
    with mock.patch.object(collectives.dist, "all_reduce", side_effect=real) as called:
        found = [all_reduce(x, mesh), all_reduce(x, mesh, torch.distributed.ReduceOp.MAX)]
        found += [all_reduce(x.round().long(), mesh), reduce_region_(x.clone(), mesh)]
    return called.call_count, [x, *found]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("size", "num", "calls"), [(2, 8, 0), (2, 1 << 14, 1), (2, 1 << 15, 4)])
def test_two_ranks_send_each_other_what_is_small(ranks, size, num, calls, transposed):
    """Up to 64 kB, here of int64 half as many numbers; the same sums on both, bit for bit."""
    (count, (x, *ours)), (_, (y, *theirs)) = ranks(size).run(reduced_by_messages, num, transposed)
    assert count == calls
    reference = [x + y, torch.maximum(x, y), x.round().long() + y.round().long(), x + y]
    for one, other, expected in zip(ours, theirs, reference, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, expected)


def test_four_ranks_use_torchs_all_reduce(ranks):
    """Whatever the size."""
    assert {count for count, _ in ranks(4).run(reduced_by_messages, 8, False)} == {4}
