"""The door of every translator: plain torch tensors go in, what the caller uses comes out again.

NumPy arrays become tensors here and nowhere else. Nothing is communicated: a DTensor of which this
rank holds a part only is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from .problems import refuse

StateDict = dict[str, torch.Tensor]
Restore = Callable[[StateDict], dict[str, Any]]

#: what smdistributed writes into partial files beside the tensors; of no use to anybody else.
MARKERS = ("_smp_is_partial", "_smp_load_info")


def opened(state_dict: Mapping[str, Any], *, dtensors: bool = True) -> tuple[StateDict, Restore]:
    """The tensors of a state dict, and the way back to what it was made of.

    Args:
        state_dict: names to tensors, NumPy arrays or DTensors that are whole on this rank;
            smdistributed's markers are left out.
        dtensors: False refuses DTensors altogether.

    Returns:
        Plain detached tensors that share memory with the input, and a function that turns such a
        dict into NumPy arrays if the input was made of them alone.

    Raises:
        ValueError: every value that is none of these, or of which this rank holds only a part.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(  # noqa: TRY004  (a public error of bad input, like all others here)
            f"state_dict = a {type(state_dict).__name__}, required: a dict of names to tensors"
        )
    given = {key: value for key, value in state_dict.items() if key not in MARKERS}
    tensors: StateDict = {}
    problems = []
    for key, value in given.items():
        try:
            tensors[key] = _plain(value, dtensors=dtensors)
        except (TypeError, ValueError) as error:
            problems.append(f"{key} is {error}")
    refuse("the state dict cannot be read", problems)
    all_numpy = bool(given) and all(isinstance(value, np.ndarray) for value in given.values())
    return tensors, _to_numpy if all_numpy else dict


def bit_identical(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors hold the same bits; unlike `torch.equal`, a NaN is equal to itself.

    Tensors on the meta device have no bits that could differ.
    """
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.is_meta and right.is_meta:
        return True
    return torch.equal(_bits(left), _bits(right.to(left.device)))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # one element counts as contiguous whatever its stride, which a view of bytes refuses
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _plain(value: Any, *, dtensors: bool) -> torch.Tensor:
    if isinstance(value, np.ndarray):
        # torch can neither write-protect memory nor walk backwards through it
        if not value.flags.writeable or any(stride < 0 for stride in value.strides):
            value = value.copy()
        return torch.from_numpy(value)
    if isinstance(value, DTensor):
        return _whole(value, allowed=dtensors)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a {type(value).__name__}, required: a tensor or a NumPy array")
    return value.detach() if value.requires_grad else value


def _whole(value: DTensor, *, allowed: bool) -> torch.Tensor:
    if not allowed:
        raise ValueError(
            "a DTensor, required: plain tensors of one rank; take DistributedModel.local_state_dict"
        )
    sizes = value.device_mesh.shape
    if any(
        size > 1 and not placement.is_replicate()
        for size, placement in zip(sizes, value.placements, strict=True)
    ):
        raise ValueError(
            f"a DTensor {value.placements} of which this rank holds a part, required: all of it; "
            "take DistributedModel.state_dict, which gathers"
        )
    return value.to_local().detach()


def _to_numpy(tensors: StateDict) -> dict[str, Any]:
    return {key: tensor.numpy() for key, tensor in tensors.items()}
