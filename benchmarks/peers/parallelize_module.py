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


def parallel(model: nn.Module, plan: Plan, mesh: DeviceMesh, whole_logits: bool = False) -> None:
    """Shard a model in place.

    With sharded logits, its forward with labels must run within torch's `loss_parallel`.
    """
    made_linear(model, mesh.size())
    layout = Replicate() if whole_logits else Shard(-1)
    head = ColwiseParallel(output_layouts=layout, use_local_output=whole_logits)
    styles = {
        **{name: ColwiseParallel() for name in plan.column},
        **{name: RowwiseParallel() for name in plan.row},
        plan.embedding: RowwiseParallel(input_layouts=Replicate()),
        plan.head: head,
    }
    parallelize_module(model, mesh, styles)
    divided(model, plan, mesh.size())
    tied(model, plan)
