"""An optimizer's state dict taken apart into moments, scalars and groups; pure arithmetic of dicts.

A moment is a tensor of its parameter's shape: Adam's averages, SGD's momentum. It has its
parameter's name, so it has its layout and its shards as well, and all moments of one kind together
are nothing but a state dict. Scalars, such as the step, pass through. Whatever has another shape is
refused: it follows from its parameter's shape in a way that only its optimizer knows. Where a
caller knows that it is of whole weights, it is set apart and passes through as well.

torch keeps the dict by index, `torch.distributed.checkpoint` by name; both are read here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tensorpar.problems import refuse

Moments = dict[str, torch.Tensor]

_SCALARS = (int, float, str, type(None))
#: the beginning of every refusal of states that are no moments.
CANNOT_FOLLOW = (
    "the optimizer's state cannot follow its parameters, required: tensors of their shapes, and "
    "scalars; Adafactor's averages of whole weights move by tensorpar.optimizer_state_dict and "
    "save_checkpoint alone"
)


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state dict by the names of the parameters.

    Attributes:
        state: parameter name to state name to value: a moment, or a scalar.
        groups: the options of each group; `params` holds names.
        by_index: whether the dict that was read is torch's own, with indices for names.
        of_whole_weights: parameter name to state name to what was set apart.
    """

    state: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    by_index: bool
    of_whole_weights: dict[str, Moments] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every parameter, in the order of the groups."""
        return [name for group in self.groups for name in group["params"]]

    def moments(self) -> dict[str, Moments]:
        """State name to parameter name to moment."""
        kinds: dict[str, Moments] = {}
        for name, values in self.state.items():
            for kind, value in values.items():
                if is_moment(value):
                    kinds.setdefault(kind, {})[name] = value
        return kinds

    def scalars(self) -> dict[str, Any]:
        """Every scalar, by the name of its parameter and its own."""
        return {
            f"{name} {kind}": value
            for name, values in self.state.items()
            for kind, value in values.items()
            if not is_moment(value)
        }

    def with_moments(self, kinds: Mapping[str, Mapping[str, Any]]) -> OptimizerState:
        """The same with other moments, of the same kinds and parameters."""
        state = {name: dict(values) for name, values in self.state.items()}
        for kind, moments in kinds.items():
            for name, moment in moments.items():
                state[name][kind] = moment
        return replace(self, state=state)

    def changed(self, change: Callable[[Moments], Mapping[str, Any]]) -> OptimizerState:
        """The same with each kind of moments changed as one state dict; raises as `told` does."""
        kinds = self.moments().items()
        return self.with_moments({kind: told(kind, change, moments) for kind, moments in kinds})

    def require_plain(self) -> None:
        """Raise ValueError listing every DTensor."""
        problems = [
            f"{kind} of {name} is a DTensor"
            for name, values in self.state.items()
            for kind, value in values.items()
            if isinstance(value, DTensor)
        ]
        what = "the optimizer's state dict is not plain, required: what optimizer_state_dict"
        refuse(f"{what} gathers; Optimizer.load_state_dict loads its own DTensors", problems)

    def state_dict(self) -> dict[str, Any]:
        """A new dict in the form that was read; by index its groups have `param_names`, too."""
        key: dict[str, Any] = {name: name for name in self.names}
        if self.by_index:
            key = {name: i for i, name in enumerate(self.names)}
        groups = []
        for group in self.groups:
            groups.append({**group, "params": [key[name] for name in group["params"]]})
            if self.by_index:
                groups[-1]["param_names"] = list(group["params"])
        state = {
            key[name]: {**values, **self.of_whole_weights.get(name, {})}
            for name, values in self.state.items()
        }
        return {"state": state, "param_groups": groups}


def is_moment(value: object) -> bool:
    """Whether a value of an optimizer's state has dims, and so its parameter's."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def told(kind: str, change: Callable[[Any], Any], moments: Any) -> Any:
    """`change(moments)`; a ValueError that it raises begins with what kind of moments it is of."""
    try:
        return change(moments)
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None


def has_names(state_dict: Mapping[str, Any]) -> bool:
    """Whether a dict tells the names of its parameters; torch's own, by index, need not."""
    return all(
        "param_names" in group or any(isinstance(key, str) for key in group.get("params", ()))
        for group in state_dict.get("param_groups", ())
        if group.get("params")
    )


def read(
    state_dict: Mapping[str, Any],
    names: Iterable[str] | None = None,
    *,
    is_apart: Callable[[str, torch.Tensor], bool] = lambda _name, _value: False,
) -> OptimizerState:
    """Take an optimizer's state dict apart.

    Args:
        state_dict: `torch.optim.Optimizer.state_dict()`, keyed by index, or the same keyed by name
            as `torch.distributed.checkpoint.state_dict` makes it.
        names: of the parameters, in the order of the optimizer; for a dict by index without
            `param_names`, which does not tell them.
        is_apart: whether a state with dims, of the parameter of that name, is no moment but
            something that no layout and no degree changes.

    Raises:
        ValueError: it is no such dict; its names are not known; a state has a shape that is not
            its parameter's. All of these are listed.
    """
    given, groups = _halves(state_dict)
    keys = [key for group in groups for key in group["params"]]
    by_index = not any(isinstance(key, str) for key in keys)
    known = _names(groups, keys, names) if by_index else keys
    problems = [
        f"{name!r} is {n} times in the groups" for name, n in Counter(known).items() if n > 1
    ]
    name_of = dict(zip(keys, known, strict=True))
    problems += [f"{key!r} is in no group" for key in given if key not in name_of]
    refuse("the optimizer's state dict cannot be read", problems)
    state = {name_of[key]: dict(values) for key, values in given.items()}
    apart = {
        name: {kind: x for kind, x in values.items() if is_moment(x) and is_apart(name, x)}
        for name, values in state.items()
    }
    for name, values in apart.items():
        state[name] = {kind: x for kind, x in state[name].items() if kind not in values}
    problems = [line for name, values in state.items() for line in _strange(name, values)]
    refuse(CANNOT_FOLLOW, problems)
    rest = iter(known)
    named = [
        {key: value for key, value in group.items() if key != "param_names"}
        | {"params": list(islice(rest, len(group["params"])))}
        for group in groups
    ]
    return OptimizerState(state, named, by_index, apart)


def _halves(state_dict: Mapping[str, Any]) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    held = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
    if not isinstance(held, list) or not {"state", "param_groups"} <= set(held):
        flat = isinstance(held, list) and any(str(key).startswith("state.") for key in held)
        advice = "; make it with flatten_optimizer_state_dict=False" if flat else ""
        told = [*held[:3], "..."] if isinstance(held, list) and len(held) > 3 else held
        raise ValueError(
            f"the optimizer's state dict has {told}, required: a dict of 'state' and "
            f"'param_groups', as torch.optim.Optimizer.state_dict() returns{advice}"
        )
    return state_dict["state"], list(state_dict["param_groups"])


def _names(groups: list[dict[str, Any]], keys: list[Any], names: Iterable[str] | None) -> list[str]:
    """The names in the order of `keys`, from the dict itself or from `names`."""
    told = [name for group in groups for name in group.get("param_names", ())]
    if names is None and len(told) != len(keys):
        raise ValueError(
            f"the optimizer's state dict tells {len(told)} names of {len(keys)} parameters, "
            "required: all; pass names=, the parameters' in the optimizer's order, or build the "
            "optimizer over model.named_parameters()"
        )
    own = told if names is None else list(names)
    if len(own) != len(keys):
        raise ValueError(
            f"names = {len(own)} names, required: {len(keys)}, one for each parameter in the "
            "optimizer's order"
        )
    if told and own != told:
        odd = next((mine, its) for mine, its in zip(own, told, strict=False) if mine != its)
        raise ValueError(
            f"names has {odd[0]!r} where the state dict's own param_names have {odd[1]!r}, "
            "required: the same; leave names out"
        )
    return own


def _strange(name: str, values: Mapping[str, Any]) -> list[str]:
    """A line for every state of one parameter that is neither a moment nor a scalar."""
    shapes = {kind: tuple(value.shape) for kind, value in values.items() if is_moment(value)}
    lines = [f"{name} has states of shapes {shapes}"] if len(set(shapes.values())) > 1 else []
    return lines + [
        f"{kind} of {name} is a {type(value).__name__}"
        for kind, value in values.items()
        if not isinstance(value, (torch.Tensor, *_SCALARS))
    ]
