"""Optimizers that look at whole weights take their own step on one whole weight at a time.

Adafactor averages over the rows and columns of a weight, Muon multiplies it by itself; neither can
be had from shards, which have other axes than Hugging Face's weights besides. So each weight is
gathered with its gradient, laid out as one process has it, and handed to the optimizer's own step
as if it were its only parameter; then every rank keeps its part. All ranks compute the same, hence
hold the same. What the optimizer remembers of a weight and has its shape is sharded as the weight
is; the rest, such as averages of rows, stays whole, so it does not depend on the degree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tensorpar.agreement import require_agreement
from tensorpar.gathering import hf_layout, own_part, whole
from tensorpar.parameters import stored_parameters
from tensorpar.styles import Layout

Optimizer = torch.optim.Optimizer
IsApart = Callable[[str, torch.Tensor], bool]

#: by the name of their class, or of one that it derives from: torch's, Transformers' and others'.
CLASSES = {"Adafactor", "Muon"}

_models: WeakSet[nn.Module] = WeakSet()
_hidden: WeakKeyDictionary[Optimizer, list[tuple[nn.Parameter, torch.Tensor]]] = WeakKeyDictionary()


def remember(model: nn.Module) -> None:
    """Know the layouts of a parallel model when an optimizer steps; it may be a copy of another."""
    _models.add(model)


def looks_at_whole_weights(optimizer: Optimizer) -> bool:
    """Whether an optimizer's steps, and what it remembers, are of whole weights."""
    return bool(CLASSES & {cls.__name__ for cls in type(optimizer).__mro__})


def tells_apart(model: nn.Module, optimizer: Optimizer) -> IsApart:
    """Which states of a parameter, by its name, are of the whole weight and not of its shape.

    They are one process's at any degree, in Hugging Face's layout and in tensorpar's.
    """
    if not looks_at_whole_weights(optimizer):
        return lambda _name, _value: False
    every = stored_parameters(model, remove_duplicate=False)
    ours = {name: torch.empty(p.shape, device="meta") for name, p in every}
    theirs = hf_layout(model, ours)

    def is_apart(name: str, value: torch.Tensor) -> bool:
        return name in ours and value.shape not in (ours[name].shape, theirs[name].shape)

    return is_apart


@dataclass(frozen=True)
class _Weight:
    """A parameter with a gradient.

    Attributes:
        name: in its model.
        parameter: on the tp mesh, or on dp x tp.
        group: of the optimizer.
        layout: None where it is as Hugging Face has it.
        sizes: of the layout's axes.
    """

    name: str
    parameter: nn.Parameter
    group: Mapping[str, Any]
    layout: Layout | None
    sizes: Mapping[str, int]

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's own step on this weight alone; collective over its mesh."""
        full = whole(self.parameter, self.layout).requires_grad_()
        full.grad = whole(self.parameter.grad, self.layout)
        if held := optimizer.state.get(self.parameter):
            optimizer.state[full] = {kind: self._whole_state(x) for kind, x in held.items()}
        groups = optimizer.param_groups
        optimizer.param_groups = [{**self.group, "params": [full]}]
        try:
            # beneath the hooks and counters that belong to a step of all parameters
            type(optimizer).step.__wrapped__(optimizer)  # type: ignore[attr-defined]
        finally:
            optimizer.param_groups = groups
            state = optimizer.state.pop(full, {})
        self.parameter.copy_(self._own(full.detach()))
        optimizer.state[self.parameter] = {
            kind: self._own(x) if self._is_shaped_alike(x, full) else x for kind, x in state.items()
        }

    def _whole_state(self, value: Any) -> Any:
        return whole(value, self.layout) if isinstance(value, DTensor) else value

    def _is_shaped_alike(self, value: Any, full: torch.Tensor) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == full.shape

    def _own(self, full: torch.Tensor) -> torch.Tensor:
        return own_part(self.parameter, full, self.layout, self.sizes)


def _step_on_whole_weights(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Step pre-hook: let the weights be stepped where the closure is called.

    That is after all other pre-hooks, which may clip gradients, and after the gradients of a
    closure of the user's; what follows in the optimizer's step finds no gradient left.
    """
    if not looks_at_whole_weights(optimizer):
        return None
    if not any(isinstance(p, DTensor) for _, p in _parameters(optimizer)):
        return None
    given: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")

    def closure() -> Any:
        loss = None if given is None else given()
        with torch.no_grad():
            _step_and_hide(optimizer)
        return loss

    return args[:1], {**kwargs, "closure": closure}


def _step_and_hide(optimizer: Optimizer) -> None:
    weights = _weights(optimizer)
    if not weights:
        return
    _require_same_steps(optimizer, weights)
    for weight in weights:
        weight.step(optimizer)
    hidden = _hidden.setdefault(optimizer, [])
    for weight in weights:
        hidden.append((weight.parameter, weight.parameter.grad))  # type: ignore[arg-type]
        weight.parameter.grad = None


def _show_gradients(optimizer: Optimizer, *_: object) -> None:
    """Step post-hook: what was hidden from the optimizer's step is there again."""
    for parameter, gradient in _hidden.pop(optimizer, ()):
        parameter.grad = gradient


def _parameters(optimizer: Optimizer) -> Iterator[tuple[Mapping[str, Any], nn.Parameter]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _weights(optimizer: Optimizer) -> list[_Weight]:
    """Every parameter of a parallel model that has a gradient, in the optimizer's order.

    Raises:
        ValueError: some are DTensors of no model that is known.
    """
    with_gradient = [
        (group, p)
        for group, p in _parameters(optimizer)
        if isinstance(p, DTensor) and p.grad is not None
    ]
    names, layouts = _names(), _layouts()
    unknown = [list(p.shape) for _, p in with_gradient if id(p) not in names]
    if len(unknown) == len(with_gradient):  # not ours
        return []
    if unknown:
        raise ValueError(
            f"{type(optimizer).__name__} steps {len(unknown)} DTensors of no parallel model that "
            f"has run, the first of shape {unknown[0]}, required: parameters of one; call the "
            "model as a whole, and give other parameters an optimizer of their own"
        )
    return [
        _Weight(names[id(p)], p, group, *layouts.get(id(p), (None, {})))
        for group, p in with_gradient
    ]


def _names() -> dict[int, str]:
    """By identity of the parameter; of the models that hold it the outermost one's."""
    names: dict[int, str] = {}
    for model in _models:
        for name, parameter in stored_parameters(model):
            names[id(parameter)] = max(name, names.get(id(parameter), ""), key=_depth)
    return names


def _depth(name: str) -> tuple[int, str]:
    return len(name), name


def _layouts() -> dict[int, tuple[Layout, Mapping[str, int]]]:
    return {
        id(module._parameters[name]): (layout, module.__dict__["axis_sizes"])
        for model in _models
        for module in model.modules()
        for name, layout in module.__dict__.get("layouts", {}).items()
        if module._parameters.get(name) is not None
    }


def _require_same_steps(optimizer: Optimizer, weights: list[_Weight]) -> None:
    """What ranks gather follows from what has a gradient and a state: they must hold the same."""
    facts = {
        weight.name: f"a gradient and states {sorted(optimizer.state.get(weight.parameter, {}))}"
        for weight in weights
    }
    mesh = weights[0].parameter.device_mesh  # type: ignore[attr-defined]
    if mesh.ndim > 1:  # data parallel: of all ranks
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, mesh.device_type)
    require_agreement(
        facts,
        mesh,
        f"the ranks' {type(optimizer).__name__} would step different parameters; build and load "
        "the optimizers alike, and let every rank run the same modules",
    )


register_optimizer_step_pre_hook(_step_on_whole_weights)
register_optimizer_step_post_hook(_show_gradients)
