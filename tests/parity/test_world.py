"""`init`, the mesh and the names of ranks in worlds of several sizes; what `init` refuses."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tensorpar
from tensorpar import CommGroup

#: what each rank of four is, tp 2: (tp_rank, rdp_rank) side by side, or with tp ranks spread out.
SIDE_BY_SIDE = [(0, 0), (1, 0), (0, 1), (1, 1)]
SPREAD = [(0, 0), (0, 1), (1, 0), (1, 1)]


def names() -> dict[str, Any]:
    """All the names of this rank, and the ranks of its groups."""
    found: dict[str, Any] = {
        name: getattr(tensorpar, name)()
        for name in tensorpar.__all__
        if name.endswith(("_rank", "_size")) or name in ("rank", "size")
    }
    for group in CommGroup:
        tensorpar.barrier(group)
        process_group = tensorpar.get_process_group(group)
        found[group.name] = process_group and dist.get_process_group_ranks(process_group)
    found["tp mesh"] = tensorpar.tp_mesh().mesh.tolist()
    found["dp mesh"] = tensorpar.dp_mesh().mesh.tolist()
    return found


@pytest.mark.parametrize(
    ("strategy", "places"),
    [("cluster", SIDE_BY_SIDE), ("DPT", SIDE_BY_SIDE), ("spread", SPREAD), ("TPD", SPREAD)],
)
def test_placement_decides_who_shares_a_model(ranks, strategy, places):
    """Ranks, sizes, groups and meshes agree with the placement strategy."""
    results = ranks(4, tensor_parallel_degree=2, placement_strategy=strategy).run(names)
    assert [(one["tp_rank"], one["rdp_rank"]) for one in results] == places
    for rank, one in enumerate(results):
        peers = [r for r in range(4) if places[r][1] == places[rank][1]]
        replicas = [r for r in range(4) if places[r][0] == places[rank][0]]
        assert one["rank"] == rank
        assert one["TP_GROUP"] == one["MP_GROUP"] == one["tp mesh"] == peers
        assert one["RDP_GROUP"] == one["DP_GROUP"] == one["dp mesh"] == replicas
        assert one["WORLD"] == [0, 1, 2, 3]
        assert one["PP_GROUP"] is None
        assert (one["dp_rank"], one["dp_size"]) == (one["rdp_rank"], 2)
        assert (one["mp_rank"], one["mp_size"]) == (one["tp_rank"], 2)
        assert (one["pp_rank"], one["pp_size"], one["size"]) == (0, 1, 4)


def test_without_a_prescaled_batch_all_ranks_are_dealt_data(ranks):
    """With `prescaled_batch=False` the data-parallel ranks are all ranks."""
    results = ranks(4, tensor_parallel_degree=2, prescaled_batch=False).run(names)
    assert [(one["dp_rank"], one["dp_size"]) for one in results] == [(r, 4) for r in range(4)]
    assert all(one["DP_GROUP"] == [0, 1, 2, 3] for one in results)


def refused(arguments: dict[str, Any]) -> tuple[str, bool]:
    """What `init` says, and whether it left anything initialised."""
    with pytest.raises(ValueError, match="required") as refusal:
        tensorpar.init(**arguments)
    return str(refusal.value), tensorpar.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"tensor_parallel_degree": 3},
            "world size = 4, required: a multiple of tensor_parallel_degree = 3",
        ),
        ({"tensor_parallel_degree": 8}, "start 8 processes or a multiple, or lower the degree"),
        ({"tensor_parallel_degree": 0}, "tensor_parallel_degree = 0, required: at least 1"),
        ({"config": {"tensor_parallel_degre": 2}}, "unknown keys ['tensor_parallel_degre']"),
        ({"config": {"tensor_parallel_degree": "2"}}, "'2' (str), required: int"),
        ({"config": {"pipeline_parallel_degree": 2}}, "pipeline_parallel_degree = 2"),
    ],
)
def test_init_refuses_on_every_rank(ranks, arguments, told):
    """A wrong degree, key or type is refused by all ranks alike and leaves nothing initialised."""
    for message, initialised in ranks(4, init=False).run(refused, arguments):
        assert told in message
        assert not initialised


def uninitialised() -> list[str]:
    """What everything that needs a world says before `init`."""
    told = []
    calls: list[Any] = [
        lambda: tensorpar.tensor_parallelism().__enter__(),
        lambda: tensorpar.parallelize(torch.nn.Linear(1, 1)),
        tensorpar.tp_mesh,
        tensorpar.tp_rank,
        tensorpar.rank,
        tensorpar.pp_rank,
        tensorpar.barrier,
        lambda: tensorpar.nn.ColumnParallelLinear(1, 1),
    ]
    for call in calls:
        with pytest.raises(RuntimeError) as refusal:
            call()
        told.append(str(refusal.value))
    return told


def test_everything_before_init_is_refused_on_every_rank(ranks):
    """Contexts, layers and rank names say which call is missing."""
    for told in ranks(2, init=False).run(uninitialised):
        assert set(told) == {
            "tensorpar is not initialised; call tensorpar.init(tensor_parallel_degree=...) first"
        }


def alone() -> dict[str, Any]:
    """A process without any launcher, from nothing to a world of one and back."""
    dist.destroy_process_group()
    assert "RANK" not in os.environ
    tensorpar.init()
    found = {"size": tensorpar.size(), "tp": tensorpar.tp_size(), "barrier": tensorpar.barrier()}
    tensorpar.shutdown()
    found["after"] = tensorpar.is_initialized() or dist.is_initialized()
    tensorpar.init({"tensor_parallel_degree": 1})
    tensorpar.init(tensor_parallel_degree=1)
    found["again"] = tensorpar.tp_rank()
    return found


def test_one_process_needs_no_launcher(ranks):
    """`init()` alone makes a world of one; `shutdown` ends it; `init` may be called again."""
    (found,) = ranks(1, init=False).run(alone)
    assert found == {"size": 1, "tp": 1, "barrier": None, "after": False, "again": 0}


def in_two_process_groups(folder: str) -> list[torch.Tensor]:
    """A layer's doubled weight in two process groups, one after the other, and both weights."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for earlier_groups in (3, 0):
        dist.destroy_process_group()
        rendezvous = f"file://{folder}/{earlier_groups}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
        for _ in range(earlier_groups):
            dist.new_group()
        tensorpar.init(tensor_parallel_degree=2)
        weight = tensorpar.nn.ColumnParallelLinear(1, 5).weight
        with torch.no_grad():
            found += [(weight * 2).full_tensor(), weight.full_tensor() * 2]
        tensorpar.barrier()
    return found


def test_init_forgets_the_groups_of_an_earlier_process_group(ranks, tmp_path):
    """DTensor keeps meshes by their layout; their groups' names are gone, or are other groups'."""
    for found in ranks(4, init=False).run(in_two_process_groups, str(tmp_path)):
        for doubled, expected in zip(found[::2], found[1::2], strict=True):
            assert torch.equal(doubled, expected)


def launched(rendezvous: str) -> tuple[int, int]:
    """A process with the environment of a launcher."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        with pytest.raises(ValueError, match="world size = 2"):
            tensorpar.init(tensor_parallel_degree=4)
        assert not dist.is_initialized()
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size
        )
        tensorpar.init(tensor_parallel_degree=2)
        return tensorpar.local_rank(), tensorpar.local_size()
    finally:
        for name in environment:
            del os.environ[name]


def test_the_launchers_environment_is_read(ranks, tmp_path):
    """World size and local ranks are the launcher's; a wrong degree starts nothing."""
    assert ranks(2, init=False).run(launched, str(tmp_path / "rendezvous")) == [(0, 2), (1, 2)]


def restartable(max_restarts: str, shares_store: str) -> str:
    """What `init` says under torchrun on two nodes, before it starts anything."""
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_MAX_RESTARTS": max_restarts,
        "TORCHELASTIC_USE_AGENT_STORE": shares_store,
    }
    dist.destroy_process_group()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # where nothing is refused, the launcher's address is asked for, and there is none
        with pytest.raises(ValueError, match=r"MASTER_ADDR|required") as told:
            tensorpar.init()
    assert not dist.is_initialized()
    return str(told.value)


@pytest.mark.parametrize(
    ("max_restarts", "shares_store", "refused"),
    [("3", "True", True), ("3", "False", False), ("0", "True", False)],
)
def test_restarts_on_several_nodes_need_a_store_each(ranks, max_restarts, shares_store, refused):
    """torchrun's own setting would let a restarted run hang: `init` says which one would not."""
    (told,) = ranks(1, init=False).run(restartable, max_restarts, shares_store)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in told) == refused
    assert ("max_restarts = 3 on 2 nodes" in told) == refused


def travelling() -> bool:
    """A layer, which holds the mesh, is copied and pickled."""
    layer = tensorpar.nn.ColumnParallelLinear(3, 5)
    twin, thawed = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 3)
    return torch.equal(layer(x), twin(x)) and torch.equal(layer(x), thawed(x))


def test_what_holds_the_mesh_can_be_copied_and_pickled(ranks):
    """No layer holds a process group, so layers travel."""
    assert ranks(2).run(travelling) == [True, True]
