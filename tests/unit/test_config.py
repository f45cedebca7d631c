"""What `init` accepts and refuses before anything is started."""

import pytest
import torch.distributed as dist

import tensorpar as tp
from tensorpar.config import Config
from tensorpar.mesh import world
from tensorpar.options import Options


def test_defaults_are_those_of_smdistributed():
    """An empty dict means one rank per model, each fed its own batch."""
    assert Config.from_mapping({}) == Config(tensor_parallel_degree=1, prescaled_batch=False)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"tensor_parallel_degre": 2}, "tensor_parallel_degre"),
        ({"tensor_parallel_degree": "2"}, "tensor_parallel_degree = '2'"),
        ({"tensor_parallel_degree": True}, "tensor_parallel_degree = True"),
        ({"tensor_parallel_degree": 0}, "required: at least 1"),
        ({"prescaled_batch": 1}, "prescaled_batch = 1"),
        ({"pipeline_parallel_degree": 2}, "pipeline_parallel_degree = 2, required: 1"),
        ({"microbatches": 4}, "microbatches = 4, required: 1"),
        ({"placement_strategy": "near"}, "placement_strategy = 'near'"),
        ({"check_replicas_every": -1}, "check_replicas_every = -1"),
        ({"optimize": "both"}, "optimize = 'both'"),
    ],
)
def test_a_wrong_entry_is_named(config, told):
    """A wrong key, type or value is refused with its name, its value and what is required."""
    with pytest.raises(ValueError, match="required") as refusal:
        Config.from_mapping(config)
    assert told in str(refusal.value)


def test_world_size_must_be_a_multiple_of_the_degree():
    """One process cannot hold two shards; nothing is started."""
    with pytest.raises(ValueError, match=r"world size = 1, required: a multiple .* = 2"):
        tp.init(tensor_parallel_degree=2)
    assert not tp.is_initialized()
    assert not dist.is_initialized()


def test_context_before_init_is_refused():
    """`tensor_parallelism()` says that `init` must come first."""
    with pytest.raises(RuntimeError, match=r"call tensorpar\.init"), tp.tensor_parallelism():
        pass


def test_alone_without_a_launcher():
    """One process needs no launcher: it is a world of one, with all the ranks' names."""
    tp.init(tensor_parallel_degree=1)
    try:
        assert world().mesh.mesh_dim_names == ("dp", "tp")
        names = ["size", "tp_size", "dp_size", "rdp_size", "mp_size", "pp_size"]
        assert [getattr(tp, name)() for name in names] == [1] * 6
        names = ["rank", "tp_rank", "dp_rank", "rdp_rank", "mp_rank", "pp_rank"]
        assert [getattr(tp, name)() for name in names] == [0] * 6
        for group in tp.CommGroup:
            tp.barrier(group)
    finally:
        tp.shutdown()
    assert not tp.is_initialized()


def test_an_unknown_option_is_named():
    """`tensor_parallelism` refuses options it does not have, and values that are no bool."""
    with pytest.raises(ValueError, match=r"unknown options \['check_batch'\]"):
        Options.of(True, {"check_batch": False})
    with pytest.raises(TypeError, match="check_batches = 1, required: True or False"):
        Options.of(True, {"check_batches": 1})
