"""Make a finished model tensor parallel in place, keeping its weights.

The one way by which a model becomes parallel: the construction context and `DistributedModel` end
here too. Parameters arrive full, in Hugging Face's layout and the same on every rank; each is laid
out, then cut. Module objects keep their identity and stay instances of their classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tensorpar import hf_compat
from tensorpar.agreement import checksum, require_agreement
from tensorpar.delayed import fill, stays_on_meta
from tensorpar.doors import Door
from tensorpar.empty_shards import answer_empty_shards
from tensorpar.mesh import tp_mesh
from tensorpar.model_doors import ModelDoor
from tensorpar.nn.linear import ColumnParallel, RowParallel
from tensorpar.nn.vocabulary import VocabParallel as VocabParallelEmbedding
from tensorpar.nn.vocabulary import VocabParallelHead
from tensorpar.options import Options, effective
from tensorpar.parameters import LocalParameters, local_shard, mix_in, parameter
from tensorpar.partition import chunk_bounds, chunk_sizes
from tensorpar.registry import Plan, find
from tensorpar.replace import replace_children
from tensorpar.saving import bind
from tensorpar.styles import Column, Layout, OwnParameter, Row, Style


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
        AttributeError: a plan names a child, attribute or argument that a class does not have.
        ValueError: the ranks' models differ, or a size does not fit its plan.
    """
    mesh = mesh or tp_mesh()
    options = options or Options()
    _require_same_model(model, mesh)
    replace_children(model, options)
    chosen = effective(model, options)
    work = _Work(mesh)
    for module, own in chosen.items():
        plan = find(type(module))
        if own.enabled and isinstance(plan, Plan) and "_tensorpar_plan" not in module.__dict__:
            work.apply(module, plan)
            if plan.fused is not None and own.fused_attention:
                mix_in(module, plan.fused)
    for module in chosen:
        work.replicate(module)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(mesh.device_type)
    work.warn_of_idle_ranks()
    fill(model, mesh, work.fresh)
    _hang_doors(model, chosen, mesh)
    return model


def _hang_doors(model: nn.Module, chosen: Mapping[nn.Module, Options], mesh: DeviceMesh) -> None:
    for module, own in chosen.items():
        if module is model or hf_compat.is_model(module):
            ModelDoor.hang(module, mesh, check_batches=own.check_batches)
        if hf_compat.is_model(module):
            bind(module)


class _Work:
    """One pass over a model: what has been cut so far, for ties and warnings."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.fresh: list[nn.Parameter] = []
        self._cut: dict[nn.Parameter, tuple[nn.Parameter, Layout | None]] = {}
        self._idle: dict[str, list[int]] = {}

    def apply(self, module: nn.Module, plan: Plan) -> None:
        """Cut the children that the plan names, shrink its counts, hang its doors."""
        children = _children(module, plan)
        for name, style in plan.children.items():
            if isinstance(style, OwnParameter):
                self._cut_own(module, name, style)
        counts = {name: _axis_sizes(module, style) for name, (_, style) in children.items()}
        heads = next((sizes["h"] for sizes in counts.values() if "h" in sizes), None)
        for name, (child, style) in children.items():
            self._convert(child, style, counts[name], entered=bool(plan.enter or plan.mixin))
        for name in plan.divide:
            _divide(module, name, heads, self.mesh)
        if heads is not None:
            self._note_idle(type(module).__name__, heads)
        if plan.mixin is not None:
            mix_in(module, plan.mixin)
            module.__dict__["mesh"] = self.mesh
        if plan.enter or (plan.mixin is not None and plan.children):
            Door(module, plan.enter, self.mesh)
        module.__dict__["_tensorpar_plan"] = plan

    def _cut_own(self, module: nn.Module, name: str, style: OwnParameter) -> None:
        full = module._parameters.get(name)
        if full is None:
            raise AttributeError(f"{type(module).__name__} has no parameter {name} of its own")
        layouts = {name: style.layouts[""]}
        module.__dict__.update(layouts=layouts, axis_sizes={})
        module._parameters[name] = self._cut_parameter(full, layouts[name], {})

    def _convert(
        self, child: nn.Module, style: Style, sizes: Mapping[str, int], *, entered: bool
    ) -> None:
        mix_in(child, _mixin(style, child))
        held = child.__dict__
        held.update(mesh=self.mesh, layouts=style.layouts, axis_sizes=dict(sizes))
        if isinstance(style, Column | Row):
            held["heads_dim"] = style.layouts["weight"].shard_dim if style.heads else None
        if isinstance(style, Row):
            held["partial"] = style.partial
        if isinstance(style, Column):
            held["copy_input"] = not entered
        for name, full in child._parameters.items():
            if full is not None:
                child._parameters[name] = self._cut_parameter(full, style.layouts[name], sizes)

    def replicate(self, module: nn.Module) -> None:
        """Turn the plain parameters that a module holds itself into replicated DTensors."""
        plain = {
            name: full
            for name, full in module._parameters.items()
            if full is not None and not isinstance(full, DTensor)
        }
        for name, full in plain.items():
            module._parameters[name] = self._cut_parameter(full, None, {})
        if plain and not hf_compat.is_model(module):
            mix_in(module, LocalParameters)

    def _cut_parameter(
        self, full: nn.Parameter, layout: Layout | None, sizes: Mapping[str, int]
    ) -> nn.Parameter:
        if full in self._cut:
            new, its_layout = self._cut[full]
            if its_layout != layout:
                raise ValueError(
                    f"a parameter of shape {tuple(full.shape)} is tied between a child that is "
                    "sharded and one that is not; make both parallel, or neither"
                )
            return new
        ours = full if layout is None else layout.pattern.apply(full, **sizes)
        dim = None if layout is None else layout.shard_dim
        shard = self._on_device(local_shard(ours, self.mesh, dim))
        new = parameter(shard, self.mesh, dim, ours.shape)
        full._tensorpar_replaced = True  # type: ignore[attr-defined]
        if full.is_meta and not new.is_meta:
            self.fresh.append(new)
        self._cut[full] = new, layout
        return new

    def _on_device(self, shard: torch.Tensor) -> torch.Tensor:
        """A shard goes to this rank's device at once; one on meta gets storage there."""
        if not shard.is_meta:
            return shard.to(self.mesh.device_type)
        if stays_on_meta():
            return shard
        empty = torch.empty(shard.shape, dtype=shard.dtype, device=self.mesh.device_type)
        return empty.requires_grad_(shard.requires_grad)

    def _note_idle(self, name: str, heads: int) -> None:
        sizes = chunk_sizes(heads, self.mesh.size())
        if idle := [rank for rank, size in enumerate(sizes) if size == 0]:
            self._idle[f"{name} ({heads} heads)"] = idle
            answer_empty_shards()

    def warn_of_idle_ranks(self) -> None:
        """One warning, on the first tensor-parallel rank."""
        if self._idle and self.mesh.get_local_rank() == 0:
            told = "; ".join(f"{name}: ranks {ranks}" for name, ranks in self._idle.items())
            warnings.warn(
                f"tensor-parallel ranks without a head at degree {self.mesh.size()}: {told}. They "
                "work on the MLPs and the vocabulary only",
                stacklevel=3,
            )


def _children(module: nn.Module, plan: Plan) -> dict[str, tuple[nn.Module, Style]]:
    found: dict[str, tuple[nn.Module, Style]] = {}
    missing = []
    for name, style in plan.children.items():
        if isinstance(style, OwnParameter):
            continue
        try:
            found[name] = module.get_submodule(name), style
        except AttributeError:
            if not style.optional:
                missing.append(name)
    if missing:
        import transformers

        raise AttributeError(
            f"{type(module).__name__} has no child {missing}, required by its plan; it has "
            f"{[name for name, _ in module.named_children()]} in transformers "
            f"{transformers.__version__}. Register a plan that fits this version"
        )
    return found


def _axis_sizes(module: nn.Module, style: Style) -> dict[str, int]:
    sizes = {"b": style.blocks(module) if callable(style.blocks) else style.blocks}
    if style.heads:
        sizes["h"] = attrgetter(style.heads)(module)
    return sizes


def _mixin(style: Style, child: nn.Module) -> type:
    if isinstance(style, Column):
        return ColumnParallel
    if isinstance(style, Row):
        return RowParallel
    if not isinstance(child, nn.Embedding):
        return VocabParallelHead
    if child.max_norm is not None or child.scale_grad_by_freq or child.sparse:
        raise ValueError(
            f"{child} has max_norm, scale_grad_by_freq or sparse, required: none of them for a "
            "sharded vocabulary"
        )
    return VocabParallelEmbedding


def _divide(module: nn.Module, name: str, heads: int | None, mesh: DeviceMesh) -> None:
    """Shrink a count to this rank's share; a rank without a head counts the one it pretends."""
    owner: Any = module
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    value = getattr(owner, attribute)
    units = value if heads is None else heads
    if value % units:
        raise ValueError(
            f"{type(module).__name__}.{name} = {value}, required: a multiple of {heads} heads"
        )
    start, stop = chunk_bounds(units, mesh.size(), mesh.get_local_rank())
    share = stop - start if heads is None else max(stop - start, 1)
    setattr(owner, attribute, value // units * share)


def _require_same_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """All ranks must hold one model before each keeps its part of it."""
    facts = {}
    for name, tensor in model.named_parameters():
        facts[name] = f"{tensor.dtype}{list(tensor.shape)}"
        if not tensor.is_meta and not isinstance(tensor, DTensor):
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
                f"{type(optimizer).__name__} holds parameters that parallelizing has replaced; "
                "build the optimizer after the model is parallel"
            )


register_optimizer_step_pre_hook(_refuse_stale_parameters)
