"""The dp x tp device mesh: which ranks share one model, and which share the data.

One mesh per process, made by `init`. A process without a launcher is a world of one. Modules hold
the mesh and take its group when they need it: a mesh can be copied and pickled, a group cannot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from tensorpar.config import PLACEMENTS, Config

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """What `init` made: the configuration and the mesh with axes `("dp", "tp")`.

    Attributes:
        config: as it was given.
        mesh: of all ranks.
        timeout: how long a collective of a group that tensorpar makes waits for a rank.
    """

    config: Config
    mesh: DeviceMesh
    timeout: timedelta


_world: World | None = None


def init(
    config: Mapping[str, Any] | None = None,
    *,
    tensor_parallel_degree: int | None = None,
    device_type: str | None = None,
    timeout: timedelta = timedelta(seconds=300),
) -> None:
    """Start tensor parallelism on all ranks; collective over the world.

    Under a launcher (`torchrun`) the process group comes from its environment variables, nccl on
    GPUs and gloo on CPUs, unless one is initialised already. Alone, the world is one rank.

    Args:
        config: a dict with the keys of `Config`, as scripts written for smdistributed pass it.
        tensor_parallel_degree: the short form; tensor-parallel ranks are then fed the same batch.
        device_type: `"cpu"` or `"cuda"`; by default cuda where there is one.
        timeout: how long a collective waits for a rank before it fails; those over the whole world
            wait as long as its process group does, if that is initialised already.

    Raises:
        ValueError: a key, type or value is wrong, the world size is not a multiple of the degree,
            or torchrun on several nodes may restart but could not (see `docs/launching.md`).
            Nothing has been started then, but a process group the launcher asked for.
    """
    global _world
    chosen = _read_config(config, tensor_parallel_degree)
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_world_size(chosen, _announced_world_size())
    if not dist.is_initialized():
        _start_process_group(device_type, timeout)
    _check_world_size(chosen, dist.get_world_size())
    _world = World(chosen, _make_mesh(chosen, device_type, timeout), timeout)
    _forget_earlier_meshes()


def shutdown() -> None:
    """Forget the mesh and end the process group."""
    global _world
    _world = None
    if dist.is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether `init` has been called in this process."""
    return _world is not None


def world() -> World:
    """The configuration and mesh; raises RuntimeError before `init`."""
    if _world is None:
        raise RuntimeError(
            "tensorpar is not initialised; call tensorpar.init(tensor_parallel_degree=...) first"
        )
    return _world


def tp_mesh() -> DeviceMesh:
    """The one-axis mesh of the ranks that share this rank's model."""
    return world().mesh["tp"]


def _read_config(config: Mapping[str, Any] | None, degree: int | None) -> Config:
    if config is None:
        return Config(tensor_parallel_degree=1 if degree is None else degree, prescaled_batch=True)
    chosen = Config.from_mapping(config)
    if degree is not None:
        chosen = replace(chosen, tensor_parallel_degree=degree)
    logger.info(
        "prescaled_batch = %s: tensor-parallel ranks are fed %s",
        chosen.prescaled_batch,
        "the same batch"
        if chosen.prescaled_batch
        else "a batch each, gathered by DistributedModel",
    )
    return chosen


def _announced_world_size() -> int:
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_world_size(config: Config, world_size: int) -> None:
    degree = config.tensor_parallel_degree
    if world_size % degree:
        raise ValueError(
            f"world size = {world_size}, required: a multiple of tensor_parallel_degree = "
            f"{degree}; start {degree} processes or a multiple, or lower the degree"
        )


def _start_process_group(device_type: str, timeout: timedelta) -> None:
    backend = "nccl" if device_type == "cuda" else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        _require_a_store_for_each_life()
        dist.init_process_group(backend, timeout=timeout)
        return
    # torchrun on one node hands a restarted group the store of the one that died, whose addresses
    # are still in it (pytorch/pytorch#135712); on several nodes restarts are not counted alike
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    life = PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=life, rank=rank, world_size=world_size, timeout=timeout)


def _require_a_store_for_each_life() -> None:
    """Refuse a run on several nodes whose first restart would meet the dead ranks' addresses."""
    max_restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if max_restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"max_restarts = {max_restarts} on {os.environ['GROUP_WORLD_SIZE']} nodes, required: "
            "a new store for each restart, or ranks would wait for those that died "
            "(pytorch/pytorch#135712); set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node and "
            "use --rdzv-backend=c10d, or pass --max-restarts=0"
        )


def _make_mesh(config: Config, device_type: str, timeout: timedelta) -> DeviceMesh:
    tp = config.tensor_parallel_degree
    ranks = torch.arange(dist.get_world_size())
    if PLACEMENTS[config.placement_strategy]:
        ranks = ranks.view(-1, tp)
    else:
        ranks = ranks.view(tp, -1).T.contiguous()
    # groups that a mesh makes by itself wait for half an hour, whatever the world's timeout is
    groups = [_own_group(ranks.T, timeout), _own_group(ranks, timeout)]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("dp", "tp"))


def _forget_earlier_meshes() -> None:
    """Clear what DTensor remembers of operations: it names the mesh that was there first.

    Equal meshes share it. After another process group, results would carry groups that are gone,
    or whose names are other groups' now.
    """
    from torch.distributed.tensor import debug  # costs far more to import than all of tensorpar

    debug._clear_sharding_prop_cache()


def _own_group(peers: torch.Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's of the groups in the rows of `peers`; collective over the world."""
    if len(peers) == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    own, _ = dist.new_subgroups_by_enumeration(peers.tolist(), timeout=timeout)
    return own
