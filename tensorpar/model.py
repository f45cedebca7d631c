"""`DistributedModel`: the wrapper that scripts written for smdistributed expect around a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.distributed.tensor import DTensor

from tensorpar.data_parallel import (
    DataParallel,
    Kind,
    require_even_batches,
    without_gradient_sync,
)
from tensorpar.empty_shards import empty_shard
from tensorpar.gathering import TIMEOUT, gathered_state_dict, load_full, tensorpar_layout
from tensorpar.mesh import tp_mesh, world
from tensorpar.options import Options
from tensorpar.own_batches import OwnBatches
from tensorpar.parallelize import parallelize
from tensorpar.parameters import local, shard_dim
from tensorpar.ranks import dp_mesh
from tensorpar.recognition import LayoutName, recognise
from tensorpar.replace import translate_functions

logger = logging.getLogger(__name__)


class DistributedModel(nn.Module):
    """A parallel model with gathering state dicts; calls and attributes reach the model inside.

    Args:
        module: a model built under `tensor_parallelism()`, or marked by
            `set_tensor_parallelism`, whose marks are carried out now. Parameters of an unmarked
            plain model become replicated.
        data_parallel: what data-parallel ranks share: `"fsdp"` shards parameters, gradients and
            optimizer states over them, `"replicate"` averages gradients, a `DataParallel` says
            more; None leaves each rank to itself. By default what the config of `init` says
            (`ddp`, `shard_optimizer_state`). Build the optimizer afterwards.

    Raises:
        RuntimeError: before `init`.
        ValueError: `data_parallel` is none of these, or some rank has no part of a parameter.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        data_parallel: DataParallel | Kind | Literal["config"] | None = "config",
    ) -> None:
        super().__init__()
        if data_parallel == "config":
            data_parallel = world().config.data_parallel
        if isinstance(data_parallel, str):
            data_parallel = DataParallel(data_parallel)
        self.module = parallelize(module, options=Options(enabled=False))
        if data_parallel is not None:
            if (problem := empty_shard(self.module)) is not None:
                raise ValueError(problem)
            data_parallel.apply(self.module, dp_mesh())
        self.__dict__["_data_parallel"] = data_parallel
        batches = None if world().config.prescaled_batch else OwnBatches(tp_mesh())
        self.__dict__["_own_batches"] = batches

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @_disable_dynamo
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; with `prescaled_batch=False` on the batches of all tp ranks together.

        Raises:
            ValueError: while training data parallel, batches of different numbers of rows.
        """
        if self.__dict__["_data_parallel"] is not None and self.training:
            given = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
            require_even_batches(given, dp_mesh())
        own_batches: OwnBatches | None = self.__dict__["_own_batches"]
        if own_batches is None:
            return self.module(*args, **kwargs)
        return own_batches.run(self.module, args, kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """`loss.backward()`."""
        loss.backward()

    def no_sync(self) -> AbstractContextManager[None]:
        """Within: gradients are accumulated on each data-parallel rank and not reduced."""
        return without_gradient_sync(self.module)

    def get_module(self) -> nn.Module:
        """The model inside."""
        return self.module

    def local_parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of which this rank holds a part: all of them."""
        return self.module.parameters(recurse)

    def distributed_modules(self) -> Iterator[nn.Module]:
        """The modules whose children are sharded."""
        return (m for m in self.module.modules() if "_tensorpar_plan" in m.__dict__)

    def is_distributed_parameter(self, parameter: nn.Parameter) -> bool:
        """Whether tensor parallelism shards this parameter, rather than replicates it."""
        return shard_dim(parameter) is not None

    def register_post_partition_hook(self, hook: Callable[[DistributedModel, Any], None]) -> None:
        """Call `hook(self, None)` after partitioning, which has happened: at once."""
        hook(self, None)

    def state_dict(  # type: ignore[override]
        self, gather_to_rank0: bool = False, *, timeout: timedelta = TIMEOUT
    ) -> dict[str, Any]:
        """Full plain CPU tensors in tensorpar layout; collective over ALL ranks.

        Args:
            gather_to_rank0: only global rank 0 gets them, other ranks an empty dict; one tensor
                is in flight at a time.
            timeout: how long to wait for the last rank to call this.

        Raises:
            TimeoutError: a rank does not make this call in time; on all ranks that do.
        """
        return gathered_state_dict(
            self.module,
            to_rank0=gather_to_rank0,
            call="DistributedModel.state_dict",
            timeout=timeout,
        )

    def local_state_dict(self) -> dict[str, Any]:
        """This rank's plain shards in tensorpar layout; nothing is communicated."""
        return {
            name: local(value).detach() if isinstance(value, DTensor) else value
            for name, value in self.module.state_dict().items()
        }

    def load_state_dict(  # type: ignore[override]
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        translate_function: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        *,
        layout: Literal["auto"] | LayoutName = "auto",
    ) -> None:
        """Load a full state dict on every rank; nothing is communicated.

        Args:
            state_dict: full tensors, or DTensors placed as the parameters are.
            strict: refuse missing and unknown keys; shapes are always checked.
            translate_function: applied to `state_dict` first.
            layout: `"hf"`, `"tensorpar"`, `"smdistributed"`, or recognised by its keys.

        Raises:
            ValueError: all keys that are missing, unknown or of the wrong shape. The model is
                unchanged then.
        """
        if translate_function is not None:
            state_dict = translate_function(state_dict)
        if layout == "auto":
            layout = recognise(self.module, state_dict)
            logger.info("load_state_dict: the state dict is in %s layout", layout)
        if layout == "smdistributed":
            state_dict, layout = self._from_smdistributed(state_dict), "hf"
        if layout == "hf":
            for _, from_hf in translate_functions(self.module):
                state_dict = from_hf(state_dict)
            state_dict = tensorpar_layout(self.module, self._renamed(state_dict))
        load_full(self.module, state_dict, strict=strict)

    def _renamed(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        from tensorpar.translators.files import renamed

        own_names: Mapping[str, Any] = renamed(self.module, state_dict)
        return own_names

    def _from_smdistributed(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        from tensorpar.translators import smdistributed_to_hf

        hf: Mapping[str, Any] = smdistributed_to_hf(state_dict, self.module.config)
        return hf
