"""Who this rank is, under the names that smdistributed gave the groups.

The mesh has two axes. `tp`: the ranks that share one model. `rdp` (reduced data parallel): the
ranks that hold the same shard. `dp`: the ranks by which data is dealt out, which are the `rdp`
ranks when tensor-parallel ranks are fed the same batch (`prescaled_batch=True`), and all ranks
when each is fed its own. `mp` (model parallel) equals `tp`, since there is no pipeline: `pp` is
one rank.
"""

from __future__ import annotations

import os
from enum import Enum

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.mesh import world


class CommGroup(Enum):
    """The groups that collectives and barriers take."""

    WORLD = "world"
    TP_GROUP = "tp"
    MP_GROUP = "mp"
    DP_GROUP = "dp"
    RDP_GROUP = "rdp"
    PP_GROUP = "pp"


def dp_mesh() -> DeviceMesh:
    """The one-axis mesh of the ranks that hold the same shard: what `fully_shard` wants."""
    return world().mesh["dp"]


def rank() -> int:
    """This process's rank in the world."""
    world()
    return dist.get_rank()


def size() -> int:
    """The number of processes."""
    world()
    return dist.get_world_size()


def local_rank() -> int:
    """This process's rank on its machine, as the launcher counts."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_size() -> int:
    """The number of processes on this machine, as the launcher counts."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def tp_rank() -> int:
    """Which shard of the model this rank holds."""
    return world().mesh.get_local_rank("tp")


def tp_size() -> int:
    """How many ranks share one model."""
    return world().mesh["tp"].size()


def rdp_rank() -> int:
    """Which copy of its shard this rank holds."""
    return world().mesh.get_local_rank("dp")


def rdp_size() -> int:
    """How many ranks hold the same shard."""
    return world().mesh["dp"].size()


def dp_rank() -> int:
    """Which part of the data this rank is fed; see this module's page."""
    if world().config.prescaled_batch:
        return rdp_rank()
    return rdp_rank() * tp_size() + tp_rank()


def dp_size() -> int:
    """Into how many parts the data is dealt out."""
    return rdp_size() if world().config.prescaled_batch else size()


def mp_rank() -> int:
    """Equal to `tp_rank`: there is no pipeline."""
    return tp_rank()


def mp_size() -> int:
    """Equal to `tp_size`: there is no pipeline."""
    return tp_size()


def pp_rank() -> int:
    """0: there is no pipeline."""
    world()
    return 0


def pp_size() -> int:
    """1: there is no pipeline."""
    world()
    return 1


def get_process_group(group: CommGroup = CommGroup.WORLD) -> dist.ProcessGroup | None:
    """The torch process group behind a name; None for a group of this rank alone (pp)."""
    mesh = world().mesh
    if group is CommGroup.PP_GROUP:
        return None
    if group in (CommGroup.TP_GROUP, CommGroup.MP_GROUP):
        return mesh.get_group("tp")
    if group is CommGroup.RDP_GROUP or (
        group is CommGroup.DP_GROUP and world().config.prescaled_batch
    ):
        return mesh.get_group("dp")
    return dist.group.WORLD


def barrier(group: CommGroup = CommGroup.WORLD) -> None:
    """Wait until every rank of `group` is here."""
    process_group = get_process_group(group)
    if process_group is not None:
        devices = [torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
        dist.barrier(process_group, device_ids=devices)
