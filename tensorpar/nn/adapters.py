"""What low-rank adapters add to the parallel layers: see `tensorpar.lora`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import copy_region
from tensorpar.nn.linear import on_first_rank
from tensorpar.parameters import local
from tensorpar.random import Fork, common_stream
from tensorpar.rows import enter_region


class SummedGradient:
    """Forward of a replicated linear layer whose neighbour is sharded.

    Each rank sees a part of the weight's gradient: because what follows is this rank's output
    features only, or because the input is this rank's term of a sum. The parts are summed.

    Attributes:
        mesh: the tp mesh.
        weight: `[out, in]`, replicated.
        bias: `[out]`, replicated, a term of the sum over ranks once; or None.
        copy_input: pass the copy region here, since no door before has done so.
    """

    mesh: DeviceMesh
    weight: torch.Tensor
    bias: Any
    copy_input: bool = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.copy_input:
            input = enter_region(input, self.mesh)
        bias = None if self.bias is None else on_first_rank(local(self.bias), self.mesh)
        return F.linear(input, copy_region(local(self.weight), self.mesh), bias)


class CommonDropout(nn.Dropout):
    """Dropout of what is the same on all ranks, with one mask on all, inside a fork too."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        with common_stream():
            return super().forward(input)


class OwnDropout(nn.Dropout):
    """Dropout of this rank's features, with a mask from this rank's own stream.

    Args:
        p: the probability of a zero.
        mesh: the tp mesh.
    """

    def __init__(self, p: float, mesh: DeviceMesh) -> None:
        super().__init__(p)
        self.mesh = mesh
        self._fork = Fork()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        if not self.training:
            return input
        self._fork.enter(self.mesh.get_local_rank())
        try:
            return super().forward(input)
        finally:
            self._fork.leave()
