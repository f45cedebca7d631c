"""`init_weights` of a parallel model: the values that one process draws, cut.

Transformers' initialiser reads shapes and rows, and draws from the common random
stream; on shards it would draw the same numbers on every rank, and as many as the rank happens to
hold. So what it is about to visit is whole and plain while it runs, as under construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tensorpar import hf_compat
from tensorpar.agreement import checksum, require_agreement
from tensorpar.gathering import placed_as, whole_parameter
from tensorpar.mesh import tp_mesh
from tensorpar.parameters import OwnMethods


class InitialisesAlike(OwnMethods):
    """Mixed into the class of a parallel Transformers model."""

    def initialize_weights(self: Any) -> None:
        """`PreTrainedModel.initialize_weights`, the heart of `init_weights`; collective.

        It visits what has no values yet: a model that was built on the meta device and given
        storage by `to_empty`, or layers that a subclass adds before it calls `post_init` again.
        Gathered, the values are those of one process at the same seed. Each rank holds what is
        visited whole meanwhile; `delayed_parameter_initialization` never does.

        Raises:
            ValueError: the ranks' random states differ; on every rank, and nothing has changed.
        """
        with _whole(self):
            super().initialize_weights()  # type: ignore[misc]


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Within: parameters that are about to be visited are full and plain, in HF's layout."""
    places = list(_visited(model))
    if places:
        _require_same_draws()
    whole: dict[tuple[nn.Parameter, bool], nn.Parameter] = {}
    for module, name, parameter, tied in places:
        if (parameter, tied) not in whole:
            whole[parameter, tied] = whole_parameter(module, name)
        module._parameters[name] = whole[parameter, tied]
    try:
        yield
    finally:
        # Transformers draws for both ends of a tie, and then keeps what the source got
        for module, name, parameter, _ in sorted(places, key=lambda place: not place[-1]):
            _keep_own_part(module, name, parameter)


def _visited(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, bool]]:
    """Module, name, parameter, and whether Transformers ties it to another, which has its values.

    An initialiser may reach into the children of the module that it is given.
    """
    tied = hf_compat.tied_names(model)
    visited = hf_compat.uninitialized_modules(model)
    inside = {module for outer in visited for module in outer.modules()}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items() if module in inside else ():
            if isinstance(parameter, DTensor) and not parameter.is_meta:
                yield module, name, parameter, f"{path}.{name}" in tied


def _keep_own_part(module: nn.Module, name: str, parameter: Any) -> None:
    """Put `parameter` back in its place, with the values that the whole one there has."""
    full = module._parameters[name].detach()  # type: ignore[union-attr]
    module._parameters[name] = parameter
    if (layout := module.__dict__.get("layouts", {}).get(name)) is not None:
        full = layout.pattern.apply(full, **module.__dict__["axis_sizes"])
    with torch.no_grad():
        parameter.copy_(placed_as(parameter, full))


def _require_same_draws() -> None:
    require_agreement(
        {"torch's random state": f"crc {checksum(torch.get_rng_state()):08x}"},
        tp_mesh(),
        "tp ranks would draw different initial values; call torch.manual_seed alike on all of them",
    )
