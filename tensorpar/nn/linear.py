"""Column- and row-parallel linear layers.

"Column" speaks of the matrix as papers write it, `Y = X A`, and means output features; torch stores
them as the weight's first dim. A column layer followed by a row layer needs one all-reduce forward
(at the row layer's end) and one backward (at the door before the column layer):

    x_BI  input, the same on all ranks       A_OI  this rank's output features, O = out / n
    column  y_BO = x_BI @ A_OI.T + a_O       B_PO  this rank's input features of the next layer
    row     z_BP = all_reduce(y_BO @ B_PO.T) + b_P
    dgrad   dy = dz @ B_PO;  dx = all_reduce(dy @ A_OI)      (the all-reduce sits at the door)
    wgrad   dA_OI = dy.T @ x;  dB_PO = dz.T @ y;  db_P = dz  (local)

While the sequence is split (`tensorpar.rows`), x and z are each rank's rows, the all-reduces become
all-gathers and reduce-scatters, and db_P is summed over ranks.

Stored weights carry one honest dim per axis, e.g. `[3, heads, head_dim, in]` for fused q|k|v, so a
shard is always one contiguous slice; the product sees a flattened view of it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import gather_region
from tensorpar.mesh import tp_mesh
from tensorpar.parameters import flattened, local, mixture, shard_in_place
from tensorpar.region import close_region, open_region, plain
from tensorpar.rows import enter_region, leave_region


def held(layer: Any, name: str) -> Any:
    """A parameter of a layer, or None; what it has itself is found without `__getattr__`."""
    own = layer._parameters
    return own[name] if name in own else getattr(layer, name)


def _operand(layer: Any, name: str, start: int, end: int) -> Any:
    """This rank's part of a weight or bias as the product takes it: axes `start` to `end` are one.

    A rank without a head computes one of zeros, so that attention code and autograd run there. It
    adds exact zeros to the row layer's sum; the parameter itself stays empty.
    """
    if (parameter := held(layer, name)) is None:
        return None
    shard, dim = local(parameter), layer.heads_dim
    if dim is not None and shard.shape[dim] == 0:
        ghost = shard.new_zeros((*shard.shape[:dim], 1, *shard.shape[dim + 1 :]))
        shard = torch.cat([shard, ghost], dim)
    return shard if start == shard.ndim + end else flattened(shard, start, end)


class ModuleDoor(Protocol):
    """What layers tell the door of a module they are in (`tensorpar.doors`)."""

    def part(self, column: Any) -> None:
        """A column layer has run."""

    def join(self) -> None:
        """A row layer has run."""


class ColumnParallel:
    """Forward of a linear layer that holds some of the output features.

    Mixed into `torch.nn.Linear` or Hugging Face's `Conv1D`, whose public sizes stay global.

    Attributes:
        mesh: the tp mesh.
        weight: `[..., in]`, DTensor sharded on one of the leading dims.
        bias: the weight's leading dims, sharded alike, or None.
        heads_dim: the dim of the weight that counts attention heads, if one does.
        copy_input: pass the copy region here; False where a module's door has done so.
        gather_output: return all features instead of this rank's.
        doors: of the modules that this layer is in, told that ranks differ from here on.
    """

    mesh: DeviceMesh
    weight: torch.Tensor
    bias: Any
    heads_dim: int | None = None
    copy_input: bool = False
    gather_output: bool = False
    doors: tuple[ModuleDoor, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in]`, the same on all ranks, to `[..., this rank's features]` (or all)."""
        if self.copy_input:
            input = enter_region(input, self.mesh)
        weight, bias = _operand(self, "weight", 0, -2), _operand(self, "bias", 0, -1)
        output = F.linear(input, weight, bias)
        if not self.gather_output:
            open_region(self.mesh)
            for door in self.doors:
                door.part(self)
            return output
        features = self.weight.shape[:-1].numel()
        return gather_region(output, output.ndim - 1, features, self.mesh)


class RowParallel:
    """Forward of a linear layer that holds some of the input features.

    Attributes:
        mesh: the tp mesh.
        weight: `[out, ...]`, DTensor sharded on one of the trailing dims.
        bias: `[out]`, replicated, added after the sum; or None.
        heads_dim: the dim of the weight that counts attention heads, if one does.
        partial: return this rank's term of the sum, and leave the sum to the caller.
        doors: of the modules that this layer is in, told that ranks agree again.
    """

    mesh: DeviceMesh
    weight: torch.Tensor
    bias: Any
    heads_dim: int | None = None
    partial: bool = False
    doors: tuple[ModuleDoor, ...] = ()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., this rank's features]` to `[..., out]`, the same on all ranks unless partial.

        While the sequence is split, this rank's rows of it.
        """
        close_region()
        weight, bias = _operand(self, "weight", 1, -1), held(self, "bias")
        if self.partial or self.mesh.size() == 1:
            bias = None if bias is None else on_first_rank(local(bias), self.mesh)
            output = F.linear(input, weight, bias)
        else:
            output = leave_region(F.linear(input, weight), self.mesh)
            output = output if bias is None else output + plain(bias)
        for door in self.doors:
            door.join()
        return output


class _OnFirstRank(torch.autograd.Function):
    """A replicated tensor as a term of a sum over ranks: itself on the first, zeros elsewhere.

    The gradient of the sum is the same on all ranks, and so is that of the tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:  # noqa: ARG004
        return x.clone() if mesh.get_local_rank() == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004
        return grad, None


def on_first_rank(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """A replicated tensor as a term of a sum over ranks: itself on the first, zeros elsewhere."""
    if mesh.size() == 1:
        return x
    term: torch.Tensor = _OnFirstRank.apply(x, mesh)
    return term


@mixture
class ColumnParallelLinear(ColumnParallel, nn.Linear):
    """`torch.nn.Linear` with its output features sharded over the tp mesh.

    The constructor draws the full weight as `torch.nn.Linear` does, so the same seed gives the
    same layer at any degree, and keeps this rank's rows.

    Args:
        in_features: global size of the input's last dim, the same on all ranks.
        out_features: global number of output features; need not divide.
        bias: whether there is one; sharded like the output.
        gather_output: return all features on every rank.
        mesh: the tp mesh; by default that of `tensorpar.init`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        gather_output: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.copy_input, self.gather_output = True, gather_output
        self.mesh = mesh or tp_mesh()
        shard_in_place(self, {"weight": 0, "bias": 0}, self.mesh)


@mixture
class RowParallelLinear(RowParallel, nn.Linear):
    """`torch.nn.Linear` with its input features sharded over the tp mesh.

    Takes what a `ColumnParallelLinear` without `gather_output` returns.

    Args:
        in_features: global number of input features; need not divide.
        out_features: size of the output, the same on all ranks.
        bias: whether there is one; replicated, added once after the sum.
        mesh: the tp mesh; by default that of `tensorpar.init`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: DeviceMesh | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias)
        self.mesh = mesh or tp_mesh()
        shard_in_place(self, {"weight": 1, "bias": None}, self.mesh)
