"""Hugging Face models made tensor parallel on stock PyTorch, and their checkpoints translated."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import tensorpar.families  # noqa: F401  (registers the tables)
from tensorpar.context import set_tensor_parallelism, tensor_parallelism
from tensorpar.data_parallel import DataParallel
from tensorpar.mesh import init, is_initialized, shutdown, tp_mesh
from tensorpar.model import DistributedModel
from tensorpar.optimizer import (
    load_optimizer_state_dict,
    local_optimizer_state_dict,
    optimizer_state_dict,
)
from tensorpar.parallelize import parallelize
from tensorpar.preemption import preemption
from tensorpar.ranks import (
    CommGroup,
    barrier,
    dp_mesh,
    dp_rank,
    dp_size,
    get_process_group,
    local_rank,
    local_size,
    mp_rank,
    mp_size,
    pp_rank,
    pp_size,
    rank,
    rdp_rank,
    rdp_size,
    size,
    tp_rank,
    tp_size,
)
from tensorpar.registry import Stream, register, tp_register, tp_register_with_module, unregister
from tensorpar.sharded_files import load_sharded, save_sharded
from tensorpar.styles import Column, Row, VocabParallel

if TYPE_CHECKING:
    from tensorpar.checkpoint import PendingSave, Resumed, load_checkpoint, save_checkpoint

__version__ = "0.1.0"

#: where names are that would make `import tensorpar` slow: torch's checkpoints take as long to
#: import as all else here together.
_LATER = dict.fromkeys(
    ("PendingSave", "Resumed", "load_checkpoint", "save_checkpoint"), "tensorpar.checkpoint"
)

__all__ = [
    "Column",
    "CommGroup",
    "DataParallel",
    "DistributedModel",
    "PendingSave",
    "Resumed",
    "Row",
    "Stream",
    "VocabParallel",
    "barrier",
    "dp_mesh",
    "dp_rank",
    "dp_size",
    "get_process_group",
    "init",
    "is_initialized",
    "load_checkpoint",
    "load_optimizer_state_dict",
    "load_sharded",
    "local_optimizer_state_dict",
    "local_rank",
    "local_size",
    "mp_rank",
    "mp_size",
    "optimizer_state_dict",
    "parallelize",
    "pp_rank",
    "pp_size",
    "preemption",
    "rank",
    "rdp_rank",
    "rdp_size",
    "register",
    "save_checkpoint",
    "save_sharded",
    "set_tensor_parallelism",
    "shutdown",
    "size",
    "tensor_parallelism",
    "tp_mesh",
    "tp_rank",
    "tp_register",
    "tp_register_with_module",
    "tp_size",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tensorpar' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
