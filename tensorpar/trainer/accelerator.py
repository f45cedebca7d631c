"""accelerate's `Accelerator`, to which the ranks that share a model are one process.

The stock one deals a batch to every rank and wraps models in DDP over all of them. This one counts
data-parallel ranks: data is dealt out to them, metrics are gathered from them. Writing and printing
are still for one rank of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import recursively_apply
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tensorpar import ranks
from tensorpar.data_parallel import without_gradient_sync
from tensorpar.model import DistributedModel


class Accelerator(accelerate.Accelerator):
    """`accelerate.Accelerator` for tensor-parallel models; made after `tensorpar.init`.

    `prepare` leaves the model as it is: with several data-parallel ranks, wrap it first with
    `DistributedModel(model, data_parallel=...)` and build the optimizer afterwards. `num_processes`
    and `process_index` are those of the data-parallel ranks; `is_main_process` is true on one rank.

    Raises:
        RuntimeError: before `init`.
        ValueError: the launcher announces other ranks than `init` found, or something that shards
            or wraps the model in accelerate's own way is asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._require_own_ranks()

    @classmethod
    def become(cls, accelerator: accelerate.Accelerator) -> None:
        """Change the class of one that somebody else has made."""
        accelerator.__class__ = cls
        accelerator._require_own_ranks()

    def _require_own_ranks(self) -> None:
        found = self.state.num_processes
        if found != ranks.size():
            raise ValueError(
                f"accelerate counts {found} processes, required: {ranks.size()}, as "
                "tensorpar.init does; start the script by torchrun or accelerate launch"
            )
        kind = str(self.distributed_type.value)
        plain = kind == "NO" or kind.startswith("MULTI_")
        if not plain or getattr(self, "parallelism_config", None) is not None:
            raise ValueError(
                f"accelerate's distributed_type = {kind} or a parallelism_config, required: "
                'neither; tensorpar.DistributedModel(model, data_parallel="fsdp") shards'
            )

    @property
    def num_processes(self) -> int:
        """How many data-parallel ranks there are."""
        return ranks.rdp_size()

    @property
    def process_index(self) -> int:
        """Which data-parallel rank this is."""
        return ranks.rdp_rank()

    @property
    def dispatch_batches(self) -> bool:
        """False: each rank reads its own batches, since one that sends them counts all ranks.

        Raises:
            ValueError: it was asked for.
        """
        if self.dataloader_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches = True, required: False or None; let each rank read the dataset"
            )
        return False

    def prepare_model(
        self,
        model: nn.Module,
        device_placement: bool | None = None,  # noqa: ARG002  # it is where it belongs
        evaluation_mode: bool = False,
    ) -> nn.Module:
        """Autocast as accelerate does it, and nothing else.

        Raises:
            ValueError: the model is not parallel, or its gradients would not be averaged.
        """
        require_parallel(model)
        inner = model.get_module() if isinstance(model, DistributedModel) else model
        if not evaluation_mode and self.num_processes > 1 and not isinstance(inner, FSDPModule):
            raise ValueError(
                f"{self.num_processes} data-parallel ranks with a model that averages no "
                "gradients, required: tensorpar.DistributedModel(model, data_parallel="
                '"replicate" or "fsdp"), and the optimizer built afterwards'
            )
        prepared: nn.Module = super().prepare_model(
            model, device_placement=False, evaluation_mode=True
        )
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As accelerate does, which steps once for each process: here each data-parallel rank."""
        prepared = super().prepare_scheduler(scheduler)
        if isinstance(prepared, AcceleratedScheduler):
            prepared.__class__ = _Scheduler
            prepared.times = 1 if self.split_batches else self.num_processes
            prepared.split_batches = True
        return prepared

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        """Within: gradients are accumulated and not reduced."""
        inner = model.get_module() if isinstance(model, DistributedModel) else model
        with without_gradient_sync(inner):
            yield

    def clip_grad_norm_(
        self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2
    ) -> torch.Tensor:
        """Clip by the norm over all ranks, which is returned plain."""
        norm: torch.Tensor = super().clip_grad_norm_(parameters, max_norm, norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def gather(self, tensor: Any) -> Any:
        """Join the tensors of the data-parallel ranks on their first dim."""
        return recursively_apply(_gathered, tensor, error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As accelerate does, over data-parallel ranks.

        Raises:
            ValueError: `input_data` is not made of tensors.
        """
        tensors = True
        try:
            recursively_apply(lambda x: x, input_data, error_on_other_type=True)
        except TypeError:
            tensors = False
        if use_gather_object or not tensors:
            raise ValueError(
                "gather_for_metrics of objects, required: tensors; torch.distributed."
                "all_gather_object(..., group=tensorpar.dp_mesh().get_group()) gathers objects"
            )
        return super().gather_for_metrics(input_data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Sum or mean of the tensors of the data-parallel ranks, times `scale`."""

        def reduced(x: torch.Tensor) -> torch.Tensor:
            total = x.clone()
            if reduction != "none":
                dist.all_reduce(total, group=ranks.dp_mesh().get_group())
            return total * (scale / self.num_processes if reduction == "mean" else scale)

        return recursively_apply(reduced, tensor, error_on_other_type=True)


class _Scheduler(AcceleratedScheduler):
    """Steps once for each data-parallel rank, as the batch has grown."""

    times: int

    def step(self, *args: Any, **kwargs: Any) -> None:
        repeats = self.step_with_optimizer and self.gradient_state.sync_gradients
        for _ in range(self.times if repeats else 1):
            if self.scheduler._step_count <= getattr(self.scheduler, "total_steps", math.inf):
                super().step(*args, **kwargs)


def require_parallel(model: nn.Module) -> None:
    """Raise ValueError unless every parameter of `model` is a DTensor."""
    if not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is not tensor parallel, required: one that was built within "
            "tensorpar.tensor_parallelism(), or tensorpar.parallelize(model)"
        )


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    own = (tensor[None] if tensor.ndim == 0 else tensor).contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.rdp_size())]
    dist.all_gather(parts, own, group=ranks.dp_mesh().get_group())
    return torch.cat(parts)
