"""Hugging Face models made tensor parallel on stock PyTorch, and their checkpoints translated."""

import tensorpar.families  # noqa: F401  (registers the tables)
from tensorpar.checkpoint import PendingSave, Resumed, load_checkpoint, save_checkpoint
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
from tensorpar.registry import register, tp_register, tp_register_with_module, unregister
from tensorpar.sharded_files import load_sharded, save_sharded
from tensorpar.styles import Column, Row, VocabParallel

__version__ = "0.1.0"

__all__ = [
    "Column",
    "CommGroup",
    "DataParallel",
    "DistributedModel",
    "PendingSave",
    "Resumed",
    "Row",
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
