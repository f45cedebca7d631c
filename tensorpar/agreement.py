"""What ranks could disagree on is compared before a collective that would hang or mix it up."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import all_reduce


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's values; reads all of them to the host."""
    # a clone is dense also where `contiguous` would leave a single element's odd stride
    values = tensor.detach().reshape(-1).clone().cpu()
    return zlib.crc32(values.view(torch.uint8).numpy().data)


def require_agreement(facts: Mapping[str, object], mesh: DeviceMesh, problem: str) -> None:
    """Raise on every rank unless all ranks of `mesh` hold equal `facts`; one tiny all-reduce.

    Args:
        facts: name to value; values are compared by their `repr`.
        mesh: the ranks that must agree.
        problem: what it means that they do not, and what to do.

    Raises:
        ValueError: `problem`, followed by the facts that differ with their values on every rank;
            those that differ in more than a checksum come first, since they explain the others.
    """
    if mesh.size() == 1:
        return
    text = repr(sorted(facts.items())).encode()
    digest = (zlib.crc32(text) << 31) + zlib.adler32(text)
    device = torch.device(mesh.device_type)
    bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    highest, lowest = (int(x) for x in all_reduce(bounds, mesh, dist.ReduceOp.MAX))
    if highest != -lowest:
        raise ValueError(f"{problem}: {_differences(facts, mesh)}")


def _differences(facts: Mapping[str, object], mesh: DeviceMesh) -> str:
    """Only reached on all ranks together, so it may communicate."""
    everyone: list[Mapping[str, object]] = [{} for _ in range(mesh.size())]
    dist.all_gather_object(everyone, dict(facts), group=mesh.get_group())
    names = dict.fromkeys(name for one in everyone for name in one)
    lines = []
    for name in sorted(names, key=lambda name: _differs_in_values_only(name, everyone)):
        values = [one.get(name, "absent") for one in everyone]
        if len({repr(value) for value in values}) > 1:
            told = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            lines.append(f"{name} = {told}")
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def _differs_in_values_only(name: str, everyone: list[Mapping[str, object]]) -> bool:
    """Whether a fact is the same on all ranks but for the checksum at its end."""
    values = [str(one.get(name, "absent")).partition(" crc ")[0] for one in everyone]
    return len(set(values)) == 1
