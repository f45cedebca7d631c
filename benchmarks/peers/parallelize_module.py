"""`torch.distributed.tensor.parallel.parallelize_module`, with the loss on sharded logits."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from peers.plans import Plan, divided, made_linear, tied


def parallel(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Shard a model in place; its forward with labels runs within torch's `loss_parallel`."""
    made_linear(model, mesh.size())
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    styles = {
        **{name: ColwiseParallel() for name in plan.column},
        **{name: RowwiseParallel() for name in plan.row},
        plan.embedding: RowwiseParallel(input_layouts=Replicate()),
        plan.head: head,
    }
    parallelize_module(model, mesh, styles)
    divided(model, plan, mesh.size())
    tied(model, plan)
