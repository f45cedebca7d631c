"""The collectives of tensor parallelism, each named for what it does forward.

They come in conjugate pairs; the backward of one is the forward of the other (Shoeybi et al.,
"Megatron-LM", 2019, section 3, operators f and g):

| forward | input | output | backward |
|---|---|---|---|
| `copy_region` | the same on all ranks | the same | all-reduce: `reduce_region` |
| `reduce_region` | a partial sum on each rank | their sum | identity: `copy_region` |
| `scatter_region` | the same on all ranks | this rank's chunk of a dim | `gather_region` |
| `gather_region` | a chunk on each rank | the whole dim | `scatter_region` |
| `all_gather_region` | a chunk on each rank | the whole dim | `reduce_scatter_region` |
| `reduce_scatter_region` | a partial sum on each rank | a chunk of the sum | `all_gather_region` |

The last pair is the first one for a sequence that is split (Korthikanti et al., "Reducing
activation recomputation in large transformer models", 2022, operators g and its conjugate): what
follows `gather_region` is computed alike on all ranks, what follows `all_gather_region` is not.

No function changes its input in place, since callers and saved tensors may still read it, but
`reduce_region_`, for terms that nobody else has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.messages import REDUCING, exchange, gather_last_dim, sends_messages
from tensorpar.parameters import local_shard
from tensorpar.partition import chunk_sizes

#: up to here two ranks on the CPU send each other what they have, and both add it up. That is one
#: trip; gloo's all-reduce makes several and wakes a thread before and after, which is more than
#: half of its time: of 64 kB 1.1 ms, a message each way 0.5 ms (2 cores, torch 2.13).
_MESSAGE_BYTES = 1 << 16
_OF_TWO: dict[Any, Callable[..., torch.Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
}


def all_reduce(
    x: torch.Tensor, mesh: DeviceMesh, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """The reduction of `x` over the ranks of `mesh`, in a new tensor; not differentiable."""
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if mesh.size() > 1:
        _all_reduce_(out, mesh, op)
    return out


def _all_reduce_(
    x: torch.Tensor, mesh: DeviceMesh, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> None:
    is_small = mesh.size() == 2 and x.nbytes <= _MESSAGE_BYTES
    combine = _OF_TWO.get(op) if is_small and sends_messages(x, mesh) else None
    if combine is None:
        dist.all_reduce(x, op, group=mesh.get_group())
        return
    rank = mesh.get_local_rank()
    terms = [x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device="cpu")]
    if rank == 1:  # the first rank's first, or they could differ in the sign of a zero
        terms.reverse()
    for message in exchange(terms[rank], {1 - rank: terms[1 - rank]}, REDUCING, mesh):
        message.wait()
    combine(*terms, out=x)


def all_gather(x: torch.Tensor, dim: int, size: int, mesh: DeviceMesh) -> torch.Tensor:
    """Chunks of a dim of global length `size`, concatenated; not differentiable.

    Chunks may be uneven or empty. Backends require equal sizes, so each is padded to the first
    rank's while it travels.
    """
    if mesh.size() == 1:
        return x
    sizes = chunk_sizes(size, mesh.size())
    if dim == x.ndim - 1 and sends_messages(x, mesh):
        return gather_last_dim(x.detach(), sizes, mesh)
    padded = x.new_zeros((*x.shape[:dim], sizes[0], *x.shape[dim + 1 :]))
    padded.narrow(dim, 0, x.shape[dim]).copy_(x.detach())
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=mesh.get_group())
    pairs = zip(parts, sizes, strict=True)
    return torch.cat([part.narrow(dim, 0, length) for part, length in pairs], dim)


def reduce_scatter(x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's chunk of dim `dim` of the sum of `x` over ranks; not differentiable.

    Chunks may be uneven or empty; they are padded to the first rank's while they travel.
    """
    if mesh.size() == 1:
        return x
    sizes = chunk_sizes(x.shape[dim], mesh.size())
    terms = x.detach().movedim(dim, 0).contiguous()
    if missing := sizes[0] * len(sizes) - len(terms):
        terms = torch.cat([terms, terms.new_zeros((missing, *terms.shape[1:]))])
    chunk = terms.new_empty((sizes[0], *terms.shape[1:]))
    dist.reduce_scatter_single(chunk, terms, group=mesh.get_group())
    return chunk[: sizes[mesh.get_local_rank()]].movedim(0, dim).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Reduce.apply(grad, ctx.mesh), None


class _CopyTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mesh: DeviceMesh, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.mesh = mesh
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        summed: dict[int, torch.Tensor] = {}
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            places = [place for place, grad in enumerate(grads) if grad.dtype == dtype]
            flat = _Reduce.apply(torch.cat([grads[place].flatten() for place in places]), ctx.mesh)
            parts = flat.split([grads[place].numel() for place in places])
            summed |= zip(places, parts, strict=True)
        return None, *(summed[place].view_as(grad) for place, grad in enumerate(grads))


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        return all_reduce(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Copy.apply(grad, ctx.mesh), None


class _ReduceInPlace(_Reduce):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        ctx.mesh = mesh
        ctx.mark_dirty(x)
        _all_reduce_(x, mesh)
        return x


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
        ctx.dim, ctx.size, ctx.mesh = dim, x.shape[dim], mesh
        # a copy, though a chunk of one row is contiguous: a view would keep all of `x` for backward
        return local_shard(x, mesh, dim).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Gather.apply(grad, ctx.dim, ctx.size, ctx.mesh), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, size: int, mesh: DeviceMesh) -> torch.Tensor:
        ctx.dim, ctx.mesh = dim, mesh
        return all_gather(x, dim, size, mesh)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _Scatter.apply(grad, ctx.dim, ctx.mesh), None, None, None


class _AllGather(_Gather):
    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _ReduceScatter.apply(grad, ctx.dim, ctx.mesh), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
        ctx.dim, ctx.size, ctx.mesh = dim, x.shape[dim], mesh
        return reduce_scatter(x, dim, mesh)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _AllGather.apply(grad, ctx.dim, ctx.size, ctx.mesh), None, None


def copy_region(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Enter a parallel region: the identity, whose backward sums the ranks' gradients."""
    return x if not torch.is_grad_enabled() or mesh.size() == 1 else _Copy.apply(x, mesh)


def copy_together(tensors: Sequence[torch.Tensor], mesh: DeviceMesh) -> tuple[torch.Tensor, ...]:
    """`copy_region` of several tensors, whose gradients are summed by one all-reduce."""
    if mesh.size() == 1 or not tensors or not torch.is_grad_enabled():
        return tuple(tensors)
    copies: tuple[torch.Tensor, ...] = _CopyTogether.apply(mesh, *tensors)
    return copies


def reduce_region(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Leave a parallel region: the sum over ranks, whose backward is the identity."""
    if mesh.size() == 1:
        return x
    return _Reduce.apply(x, mesh) if torch.is_grad_enabled() else all_reduce(x, mesh)


def reduce_region_(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """`reduce_region` of a contiguous temporary, which becomes the sum: nothing is copied.

    Args:
        x: this rank's term, of which neither the caller nor a saved tensor is to read more.
        mesh: the ranks that have terms.
    """
    if mesh.size() == 1 or not x.is_contiguous():
        return reduce_region(x, mesh)
    summed: torch.Tensor = _ReduceInPlace.apply(x, mesh)
    return summed


def scatter_region(x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's chunk of dim `dim` (not negative) of `x`, which is the same on all ranks."""
    return x if mesh.size() == 1 else _Scatter.apply(x, dim, mesh)


def gather_region(x: torch.Tensor, dim: int, size: int, mesh: DeviceMesh) -> torch.Tensor:
    """The whole dim `dim` (not negative, of global length `size`) from the ranks' chunks.

    The backward hands each rank its own chunk, so what follows must be computed alike on all
    ranks, as everything outside a parallel region is.
    """
    if mesh.size() == 1:
        return x
    if not torch.is_grad_enabled():
        return all_gather(x, dim, size, mesh)
    return _Gather.apply(x, dim, size, mesh)


def all_gather_region(x: torch.Tensor, dim: int, size: int, mesh: DeviceMesh) -> torch.Tensor:
    """The whole dim `dim` (not negative, of global length `size`) from the ranks' chunks.

    The backward sums the ranks' gradients and hands each its chunk: for what ranks go on to
    compute different things from.
    """
    return x if mesh.size() == 1 else _AllGather.apply(x, dim, size, mesh)


def reduce_scatter_region(x: torch.Tensor, dim: int, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's chunk of dim `dim` (not negative) of the sum of `x` over ranks."""
    return x if mesh.size() == 1 else _ReduceScatter.apply(x, dim, mesh)
