"""What one plan does to one module: children become parallel layers, counts shrink.

Layout first, then partition: a full parameter in Hugging Face's axes is rearranged by its pattern,
and this rank's slice of it is kept. Module objects stay the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tensorpar import hf_compat
from tensorpar.delayed import stays_on_meta
from tensorpar.doors import Door, Randomness, check_arguments
from tensorpar.empty_shards import answer_empty_shards
from tensorpar.loading import Keeper
from tensorpar.nn.linear import ColumnParallel, RowParallel
from tensorpar.nn.vocabulary import VocabParallel as VocabParallelEmbedding
from tensorpar.nn.vocabulary import VocabParallelHead
from tensorpar.parameters import local_shard, mix_in, parameter
from tensorpar.partition import chunk_bounds, chunk_sizes
from tensorpar.promise import origin_of
from tensorpar.region import LocalParameters
from tensorpar.registry import Plan, find
from tensorpar.styles import Column, Layout, OwnParameter, Row, Style


class Narrowing:
    """One pass over a model: what has been cut so far, for ties and warnings.

    Args:
        mesh: the tp mesh.
        keeper: reads parameters that are still in files; None where there are none.

    Attributes:
        fresh: parameters that were born on meta and have storage now, but no values.
    """

    def __init__(self, mesh: DeviceMesh, keeper: Keeper | None = None) -> None:
        self.mesh = mesh
        self.keeper = keeper
        self.fresh: list[nn.Parameter] = []
        self._cut: dict[nn.Parameter, tuple[nn.Parameter, Layout | None]] = {}
        self._idle: dict[str, list[int]] = {}

    def apply(self, module: nn.Module, plan: Plan, *, reproducible: bool = False) -> None:
        """Cut the children that the plan names, shrink its counts, hang its doors.

        `reproducible`: dropout inside draws the masks of one process.
        """
        children = _children(module, plan)
        for name, style in plan.children.items():
            if isinstance(style, OwnParameter):
                layouts = {name: style.layouts[""]}
                module.__dict__.update(layouts=layouts, axis_sizes={})
                full = module.get_parameter(name)
                module._parameters[name] = self.cut_parameter(full, layouts[name], {})
        heads = _num_heads(module, children)
        for child, style in children.values():
            sizes = _axis_sizes(module, style)
            self.convert(child, style, sizes, entered=bool(plan.enter or plan.mixin))
        for name in plan.divide:
            share = _share(module, name, heads, self.mesh.size(), self.mesh.get_local_rank())
            _set(module, name, share)
        if heads is not None:
            self._note_idle(type(module).__name__, heads)
        if plan.mixin is not None:
            mix_in(module, plan.mixin)
            module.__dict__["mesh"] = self.mesh
        columns = any(isinstance(style, Column) for style in plan.children.values())
        enters = columns or plan.enter or (plan.mixin is not None and plan.children)
        if enters and self.mesh.size() > 1:  # one rank has nobody to differ from
            Door(module, plan.enter, self.mesh, Randomness(heads, reproducible=reproducible))
        module.__dict__["_tensorpar_plan"] = True  # carried out; plans hold functions

    def convert(
        self, child: nn.Module, style: Style, sizes: Mapping[str, int], *, entered: bool
    ) -> None:
        """Make one child a parallel layer, its parameters full and plain until now.

        Args:
            child: the layer.
            style: how it is sharded.
            sizes: lengths of the axes `b` and `h`, as far as the style has them.
            entered: whether its input has passed the copy region before it.
        """
        mix_in(child, _mixin(style, child))
        held = child.__dict__
        held.update(mesh=self.mesh, layouts=style.layouts, axis_sizes=dict(sizes))
        held["style"] = replace(style, blocks=sizes["b"])
        if isinstance(style, Column | Row):
            held["heads_dim"] = style.layouts["weight"].shard_dim if style.heads else None
        if isinstance(style, Row):
            held["partial"] = style.partial
        if isinstance(style, Column):
            held["copy_input"] = not entered
        for name, full in child._parameters.items():
            if full is not None:
                child._parameters[name] = self.cut_parameter(full, style.layouts[name], sizes)

    def cut_own(self, module: nn.Module, name: str) -> None:
        """Cut one plain parameter of a module that has been laid out before."""
        full = module._parameters[name]
        if full is not None and not isinstance(full, DTensor):
            layout, sizes = module.__dict__["layouts"][name], module.__dict__["axis_sizes"]
            module._parameters[name] = self.cut_parameter(full, layout, sizes)

    def replicate(self, module: nn.Module) -> None:
        """Turn the plain parameters that a module holds itself into replicated DTensors."""
        plain = {
            name: full
            for name, full in module._parameters.items()
            if full is not None and not isinstance(full, DTensor)
        }
        for name, full in plain.items():
            module._parameters[name] = self.cut_parameter(full, None, {})
        if plain and not hf_compat.is_model(module):
            mix_in(module, LocalParameters)

    def cut_parameter(
        self, full: nn.Parameter, layout: Layout | None, sizes: Mapping[str, int]
    ) -> nn.Parameter:
        """This rank's part of a full parameter; the same for those that are tied to it."""
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
        if origin_of(full) is not None:
            assert self.keeper is not None
            shard = self.keeper.shard(full, ours.shape, layout)
        else:
            shard = self._on_device(local_shard(ours, self.mesh, dim))
        new = parameter(shard, self.mesh, dim, ours.shape)
        full._tensorpar_replaced = True  # type: ignore[attr-defined]
        if full.is_meta and not new.is_meta and origin_of(full) is None:
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


def planned_layouts(model: nn.Module) -> dict[str, Layout]:
    """The layouts that parameters of a model will have when it is parallel, by their names."""
    layouts: dict[nn.Parameter | None, Layout] = {}
    for module in model.modules():
        if isinstance(plan := find(type(module)), Plan):
            for name, style in plan.children.items():
                if isinstance(style, OwnParameter):
                    layouts[module._parameters[name]] = style.layouts[""]
            for child, style in _children(module, plan).values():
                layouts |= {child._parameters.get(name): x for name, x in style.layouts.items()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: layouts[parameter] for name, parameter in named if parameter in layouts}


def check(module: nn.Module, plan: Plan) -> None:
    """Raise what `Narrowing.apply` would, before anything is changed.

    Raises:
        AttributeError: the plan names a child, parameter, count or forward argument that the
            module does not have.
        ValueError: a count or a dim is no multiple of the heads, or a layer has options that do not
            shard.
    """
    children = _children(module, plan)
    for name, style in plan.children.items():
        if isinstance(style, OwnParameter) and module._parameters.get(name) is None:
            raise AttributeError(f"{type(module).__name__} has no parameter {name} of its own")
    for child, style in children.values():
        _mixin(style, child)
        for name, full in child._parameters.items():
            if full is not None and not isinstance(full, DTensor):
                pattern = style.layouts[name].pattern
                pattern.apply(full.to("meta"), **_axis_sizes(module, style))
    heads = _num_heads(module, children)
    for name in plan.divide:
        _share(module, name, heads, 1, 0)
    check_arguments(module, plan.enter)
    own = {name for name, style in plan.children.items() if isinstance(style, OwnParameter)}
    if plan.enter and (inside := sorted(module._parameters.keys() - own)):
        raise ValueError(
            f"{type(module).__name__} has enter = {plan.enter} and parameters {inside} of its own, "
            "required: not both, since one may be used before the sharded layers and one after; "
            "leave `enter` empty, and each column layer enters by itself"
        )


def _num_heads(module: nn.Module, children: Mapping[str, tuple[nn.Module, Style]]) -> int | None:
    sizes = (_axis_sizes(module, style) for _, style in children.values())
    return next((size["h"] for size in sizes if "h" in size), None)


def _children(module: nn.Module, plan: Plan) -> dict[str, tuple[nn.Module, Style]]:
    found: dict[str, tuple[nn.Module, Style]] = {}
    missing = []
    for name, style in plan.children.items():
        if isinstance(style, OwnParameter):
            continue
        if (child := _child(module, name, style.formerly)) is not None:
            found[name] = child, style
        elif not style.optional:
            missing.append(name)
    if missing:
        import transformers

        raise AttributeError(
            f"{type(module).__name__} has no child {missing}, required by its plan; it has "
            f"{[name for name, _ in module.named_children()]} in transformers "
            f"{transformers.__version__}. Register a plan that fits this version"
        )
    return found


def _child(module: nn.Module, *names: str | None) -> nn.Module | None:
    """The first that there is."""
    for name in filter(None, names):
        with suppress(AttributeError):
            return module.get_submodule(name)
    return None


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


def _share(module: nn.Module, name: str, heads: int | None, num_ranks: int, rank: int) -> int:
    """A rank's share of a count; a rank without a head counts the one it pretends to have."""
    value: int = attrgetter(name)(module)
    units = value if heads is None else heads
    if value % units:
        raise ValueError(
            f"{type(module).__name__}.{name} = {value}, required: a multiple of {heads} heads"
        )
    start, stop = chunk_bounds(units, num_ranks, rank)
    return value // units * (stop - start if heads is None else max(stop - start, 1))


def _set(module: nn.Module, name: str, value: int) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(attrgetter(path)(module) if path else module, attribute, value)
