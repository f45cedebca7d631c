"""Make a finished model tensor parallel in place, keeping its weights.

The one way by which a model becomes parallel: the construction context and `DistributedModel` end
here too. Parameters arrive full, in Hugging Face's layout and the same on every rank; each is laid
out, then cut. Module objects keep their identity and stay instances of their classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tensorpar import attention_choice, hf_compat
from tensorpar.agreement import checksum, require_agreement
from tensorpar.delayed import fill
from tensorpar.foreign_shards import refuse_foreign_shards
from tensorpar.initialising import InitialisesAlike
from tensorpar.loading import LOADED, Keeper, fact
from tensorpar.lora import without_adapters
from tensorpar.mesh import tp_mesh
from tensorpar.model_doors import ModelDoor
from tensorpar.narrowing import Narrowing, check
from tensorpar.nn.attention import ParallelAttention
from tensorpar.options import Options, effective
from tensorpar.parameters import mix_in
from tensorpar.promise import origin_of
from tensorpar.region import LocalParameters
from tensorpar.registry import Plan, find, require_classes
from tensorpar.replace import replace_children
from tensorpar.reproducible import refuse_unknown_order
from tensorpar.resizing import bind_resizing
from tensorpar.saving.own_methods import bind
from tensorpar.sequence import StreamDoor, require_splittable


def parallelize(
    model: nn.Module, *, mesh: DeviceMesh | None = None, options: Options | None = None
) -> nn.Module:
    """Shard a model over the tensor-parallel ranks, in place; collective over them.

    Args:
        model: any module; every registered class inside it is made parallel, every other
            parameter becomes a replicated DTensor. Its weights are kept and must be the same on
            all ranks. What is parallel already is left alone.
        mesh: the tp mesh; by default that of `tensorpar.init`.
        options: by default all on; marks made by `set_tensor_parallelism` win.

    Returns:
        `model`.

    Raises:
        RuntimeError: before `init`.
        AttributeError: a plan names a class, child, attribute or argument that is not there.
        ValueError: the ranks' models differ, a size does not fit its plan,
            `reproducible_dropout` is asked of an attention whose draws are not known, or
            `sequence_parallel` of a model whose sequence cannot be split.
    """
    mesh = mesh or tp_mesh()
    options = options or Options()
    require_splittable(model, effective(model, options))
    _refuse_unknown_kernels(model, options, mesh)
    _require_same_model(model, mesh)
    for module in model.modules():
        if hf_compat.is_model(module):
            require_classes(type(module))
    with without_adapters(model):
        _cut(model, mesh, options, root=model)
    return model


def join(module: nn.Module, options: Options) -> None:
    """Make a module parallel that a parallel model is about to get; collective as `parallelize`."""
    if any(not isinstance(parameter, DTensor) for parameter in module.parameters()):
        mesh = tp_mesh()
        _require_same_model(module, mesh)
        with without_adapters(module):
            _cut(module, mesh, options, root=None)


def join_parameter(module: nn.Module, full: nn.Parameter) -> nn.Parameter:
    """The same of a parameter that a module of a parallel model is about to get."""
    if isinstance(full, DTensor) or "layouts" in module.__dict__:
        return full
    narrowing = Narrowing(tp_mesh())
    if not hf_compat.is_model(module):
        mix_in(module, LocalParameters)
    return narrowing.cut_parameter(full, None, {})


def is_settled(root: nn.Module) -> bool:
    """Whether a model is parallel, and what it gets from now on must be so too."""
    return "_tensorpar_door" in root.__dict__ and "_tensorpar_unsettled" not in root.__dict__


def _cut(model: nn.Module, mesh: DeviceMesh, options: Options, *, root: nn.Module | None) -> None:
    replace_children(model, options)
    chosen = effective(model, options)
    plans = {
        module: plan
        for module, own in chosen.items()
        if own.enabled and isinstance(plan := _open_plan(module), Plan)
    }
    for module, plan in plans.items():
        check(module, plan)
    keeper = Keeper(model, mesh)
    narrowing = Narrowing(mesh, keeper)
    for module, plan in plans.items():
        narrowing.apply(module, plan, reproducible=chosen[module].reproducible_dropout)
        if plan.fused is not None and chosen[module].fused_attention:
            mix_in(module, plan.fused)
    for module in chosen:
        narrowing.replicate(module)
        _move_buffers(module, mesh)
    keeper.close()
    narrowing.warn_of_idle_ranks()
    fill(model, mesh, narrowing.fresh)
    for module, plan in plans.items():
        if plan.stream is not None and chosen[module].sequence_parallel and mesh.size() > 1:
            StreamDoor.hang(module, plan.stream, mesh)
    _hang_doors(root, chosen, mesh)


def _open_plan(module: nn.Module) -> object:
    """What is registered for a module, unless it has been carried out."""
    return None if "_tensorpar_plan" in module.__dict__ else find(type(module))


def _refuse_unknown_kernels(model: nn.Module, options: Options, mesh: DeviceMesh) -> None:
    for module, own in effective(model, options).items():
        if own.enabled and own.reproducible_dropout and hf_compat.is_model(module):
            implementation = hf_compat.attention_implementation(module)
            refuse_unknown_order(module, implementation, mesh.device_type)


def _move_buffers(module: nn.Module, mesh: DeviceMesh) -> None:
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        if origin_of(buffer) is not None:
            module._buffers[name] = origin_of(buffer)[...].to(mesh.device_type, buffer.dtype)
        elif not buffer.is_meta:
            module._buffers[name] = buffer.to(mesh.device_type)


def _hang_doors(
    root: nn.Module | None, chosen: Mapping[nn.Module, Options], mesh: DeviceMesh
) -> None:
    every = max(own.check_replicas_every for own in chosen.values())
    for module, own in chosen.items():
        if module is root or hf_compat.is_model(module):
            ModelDoor.hang(
                module,
                mesh,
                check_batches=own.check_batches,
                check_replicas_every=every,
                gather_logits=own.gather_logits,
            )
        if module is root and "_tensorpar_guarded" not in module.__dict__:
            module.__dict__["_tensorpar_guarded"] = True
            module.register_load_state_dict_pre_hook(refuse_foreign_shards)
        if hf_compat.is_model(module):
            bind(module)
            mix_in(module, InitialisesAlike)
            bind_resizing(module, root or module)
            attention_choice.bind(module)
        if isinstance(module, ParallelAttention) and own.reproducible_dropout:
            module.reproducible_dropout = True


def _require_same_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """All ranks must hold one model before each keeps its part of it."""
    facts = {LOADED: "done"}
    for name, tensor in model.named_parameters():
        facts[name] = f"{tensor.dtype}{list(tensor.shape)}"
        if origin_of(tensor) is not None:
            facts[name] += f" {fact(tensor)}"
        elif not tensor.is_meta and not isinstance(tensor, DTensor):
            flat = tensor.detach().reshape(-1)
            facts[name] += f" crc {checksum(flat[:: max(1, flat.numel() // 16)]):08x}"
    require_agreement(
        facts,
        mesh,
        "tensor-parallel ranks hold different models; build them with the same config and the same "
        "torch.manual_seed on every rank, or load the same checkpoint",
    )


def _refuse_stale_parameters(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        if any(getattr(p, "_tensorpar_replaced", False) for p in group["params"]):
            raise RuntimeError(
                f"{type(optimizer).__name__} holds parameters that parallelizing or resizing has "
                "replaced; build the optimizer after the model is parallel and has its vocabulary"
            )


register_optimizer_step_pre_hook(_refuse_stale_parameters)
