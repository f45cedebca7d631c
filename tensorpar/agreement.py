"""What ranks could disagree on is compared before a collective that would hang or mix it up."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import all_reduce


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's values; reads all of them to the host. 0 where there are none."""
    # a clone is dense also where `contiguous` would leave a single element's odd stride
    values = tensor.detach().reshape(-1).clone().cpu()
    if isinstance(values, FakeTensor):
        return 0
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
    found = differing(facts, mesh)
    lines = [
        f"{name} = {', '.join(f'{value} on rank {rank}' for rank, value in enumerate(values))}"
        for name, values in sorted(found.items(), key=lambda item: _same_but_values(item[1]))
    ]
    if lines:
        more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise ValueError(f"{problem}: {'; '.join(lines[:5])}{more}")


def differing(facts: Mapping[str, object], mesh: DeviceMesh) -> dict[str, list[object]]:
    """The facts that differ, in order, each with its value on every rank; the same on all ranks.

    One tiny all-reduce, whatever the ranks hold; where they differ, all find so and gather them.

    Args:
        facts: as for `require_agreement`.
        mesh: the ranks that must agree.
    """
    if mesh.size() == 1:
        return {}
    text = repr(sorted(facts.items())).encode()
    digest = (zlib.crc32(text) << 31) + zlib.adler32(text)
    device = torch.device(mesh.device_type)
    bounds = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    highest, lowest = (int(x) for x in all_reduce(bounds, mesh, dist.ReduceOp.MAX))
    if highest == -lowest:
        return {}
    everyone: list[Mapping[str, object]] = [{} for _ in range(mesh.size())]
    dist.all_gather_object(everyone, dict(facts), group=mesh.get_group())
    names = dict.fromkeys(name for one in everyone for name in one)
    values = {name: [one.get(name, "absent") for one in everyone] for name in names}
    return {name: of for name, of in values.items() if len({repr(value) for value in of}) > 1}


def _same_but_values(values: list[object]) -> bool:
    """Whether a fact is the same on all ranks but for the checksum at its end."""
    return len({str(value).partition(" crc ")[0] for value in values}) == 1
