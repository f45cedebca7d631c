"""Transformers' own tensor parallelism, with the plans that it lacks for these families."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from peers.plans import Plan, divided, made_linear, matching, tied


def parallel(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Shard a model in place."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    made_linear(model, mesh.size())
    # a tied parameter is known under one name
    parameters = {name for name, _ in model.named_parameters()}
    styles = {}
    for patterns, style in (
        (plan.column, "colwise"),
        (plan.row, "rowwise"),
        ((plan.embedding,), "embedding_rowwise"),
        ((plan.head,), "colwise_gather_output"),
    ):
        for pattern in patterns:
            for name, _ in matching(model, pattern):
                styles[name] = style
                for parameter in ("weight", "bias"):
                    if f"{name}.{parameter}" in parameters:
                        styles[f"{name}.{parameter}"] = style
    styles |= {name: "colwise" for name in plan.head_biases if name in parameters}
    apply_tensor_parallelism(model, mesh, styles)
    divided(model, plan, mesh.size())
    tied(model, plan)
