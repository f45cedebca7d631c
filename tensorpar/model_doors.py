"""A model's doors: what happens once per forward, around the model as a whole.

On the way in: tensor-parallel ranks are compared to be fed the same batch, and when labels are
given the loss is set to be computed on the shards; data-parallel ranks, which are seeded alike to
hold the same model, get random streams of their own while training. On the way out: what is
sharded becomes whole, except the logits of a training step with labels, and where asked for those
of an evaluation with labels: they stay a DTensor `Shard(-1)`, so that nothing is communicated for
what nobody reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._compile import _disable_dynamo
from torch.distributed import DebugLevel, get_debug_level  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tensorpar import hf_compat
from tensorpar.agreement import checksum, require_agreement
from tensorpar.collectives import gather_region
from tensorpar.empty_shards import empty_shard
from tensorpar.guard import Guard, guarded_generation
from tensorpar.mesh import is_initialized, world
from tensorpar.nn.cross_entropy import ShardedLoss
from tensorpar.nn.tied import tied_weights
from tensorpar.parameters import OwnMethods, local, mix_in, shard_dim
from tensorpar.partition import chunk_sizes
from tensorpar.random import Fork
from tensorpar.region import begin_forward, close_region, end_forward, plain_shelf
from tensorpar.rows import whole_again
from tensorpar.whole_weights import remember

#: for how many forwards of a model the content of the batch is compared, not only its shape.
CONTENT_STEPS = 10

_inside: ContextVar[bool] = ContextVar("inside_a_forward", default=False)
_generating: ContextVar[bool] = ContextVar("generating", default=False)
_unread: ContextVar[bool] = ContextVar("logits_unread", default=False)


@contextmanager
def generating(model: nn.Module) -> Iterator[Callable[[Any], Any]]:
    """Within: forwards belong to one `generate`, whose inputs were compared at its start.

    Yields a function that takes what it returns: the guard's last look.
    """
    token = _generating.set(True)
    try:
        with guarded_generation():
            yield model.__dict__["_tensorpar_door"].guard.finish_generation
    finally:
        _generating.reset(token)


@contextmanager
def logits_unread() -> Iterator[None]:
    """Within: of forwards with labels only the loss is wanted; no logits are gathered for them.

    As the option `gather_logits=False`, for a while.
    """
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


@dataclass(frozen=True)
class _Forward:
    """One forward that is under way."""

    contexts: ExitStack
    is_outermost: bool
    as_tuple: bool


class Uncompiled(OwnMethods):
    """Mixed into the class of a model with doors: `torch.compile` leaves it as it is.

    What happens at doors, comparing batches and forking generators among it, is no graph's; and
    ranks whose graphs broke at different places could meet in different collectives.
    """

    @_disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model, also after `model.compile()`."""
        return self._call_impl(*args, **kwargs)  # type: ignore[attr-defined]


class ModelDoor:
    """Hooks at the entrance and the exit of a model, and of each Transformers model inside it.

    Args:
        model: the module; a model inside another does less (see `open` and `close`).
        mesh: the tp mesh.
        check_batches: whether to compare batches.
        check_replicas_every: how often to compare what ranks have in common; 0 for never.
        gather_logits: whether logits of an evaluation with labels become whole.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        *,
        check_batches: bool,
        check_replicas_every: int = 0,
        gather_logits: bool = True,
    ) -> None:
        self.mesh = mesh
        self.gather_logits = gather_logits
        self.guard = Guard(model, mesh, check_replicas_every)
        self.check_batches = check_batches
        self._has_idle_rank = empty_shard(model) is not None
        self.fork = Fork(parts_tensor_parallel_ranks=False)
        self._steps = 0
        self._forwards: list[_Forward] = []
        parameters = inspect.signature(model.forward).parameters
        self._names = list(parameters)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes_return_dict = takes_any or "return_dict" in parameters
        inner = (module for module in model.modules() if module is not model)
        self._records_attentions = hf_compat.is_model(model) and not any(
            hf_compat.is_model(module) for module in inner
        )

    @classmethod
    def hang(cls, model: nn.Module, mesh: DeviceMesh, **choices: Any) -> None:
        """Give `model` its doors, unless it has them."""
        if "_tensorpar_door" in model.__dict__:
            return
        door = cls(model, mesh, **choices)
        model.__dict__["_tensorpar_door"] = door
        mix_in(model, Uncompiled)
        remember(model)
        model.register_forward_pre_hook(door.open, prepend=True, with_kwargs=True)
        model.register_forward_hook(door.close, always_call=True)

    def open(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook. Only the outermost model compares batches.

        Raises:
            ValueError: on every rank: the ranks' arguments differ,
                or the model is data parallel and some rank has no part of a parameter.
            DivergenceError: what the guard checks differs; on every rank.
        """
        is_hf = hf_compat.is_model(model)
        asks_for_dict = is_hf and self._takes_return_dict
        as_tuple = asks_for_dict and not hf_compat.returns_dict(model, kwargs)
        close_region()  # an exception may have left one open
        forward = _Forward(ExitStack(), not _inside.get(), as_tuple)
        self._forwards.append(forward)
        forward.contexts.callback(end_forward, begin_forward())
        if is_hf and model._parameters:  # no `LocalParameters`: a model's forward is left alone
            shelf = model._parameters
            model.__dict__["_parameters"] = plain_shelf(shelf)
            forward.contexts.callback(model.__dict__.__setitem__, "_parameters", shelf)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if forward.is_outermost:
            self._enter_outermost(model, given, forward.contexts)
        if given.get("labels") is not None:
            forward.contexts.enter_context(ShardedLoss())
        return args, {**kwargs, "return_dict": True} if asks_for_dict else kwargs

    def _enter_outermost(
        self, model: nn.Module, given: dict[str, Any], contexts: ExitStack
    ) -> None:
        contexts.callback(_inside.reset, _inside.set(True))
        contexts.enter_context(tied_weights())
        remember(model)
        if self._has_idle_rank and torch.is_grad_enabled():
            self._refuse_fully_shard(model)
        if self.check_batches and not _generating.get():
            self.compare(given, training=model.training)
        self.guard.enter(model, given)
        # not `mesh["dp"]`: a slice is a new mesh, which torch.compile cannot make
        if model.training and is_initialized() and world().mesh.size(0) > 1:
            self.fork.enter(world().mesh.get_local_rank("dp"))
            contexts.callback(self.fork.leave)

    def _refuse_fully_shard(self, model: nn.Module) -> None:
        """What `DistributedModel` refuses, where the user has called torch's function by hand."""
        if dist.get_backend(self.mesh.get_group()) == "fake":
            return  # a plan, which says it in a note: its only rank has a part of everything
        from torch.distributed.fsdp import FSDPModule  # takes a while, and few models come here

        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        if sharded and (problem := empty_shard(model)) is not None:
            raise ValueError(problem)

    def compare(self, given: dict[str, Any], *, training: bool) -> None:
        """Raise on all ranks unless they are fed alike.

        Content is compared on the first steps, then only under `TORCH_DISTRIBUTED_DEBUG=DETAIL`.
        """
        content = self._steps < CONTENT_STEPS or get_debug_level() == DebugLevel.DETAIL
        facts = argument_facts(given, content=content)
        # both decide which collectives follow
        facts["model.training"], facts["gradients"] = training, torch.is_grad_enabled()
        if content and training:
            facts["torch's random state"] = f"crc {checksum(torch.get_rng_state()):08x}"
        self._steps += 1
        require_agreement(
            facts,
            self.mesh,
            "tp ranks were fed different batches or seeded differently; shard data by dp_rank (as "
            "Trainer and Accelerator of tensorpar.trainer do) and call torch.manual_seed alike on "
            "all tp ranks",
        )

    def close(self, model: nn.Module, _args: object, output: Any) -> Any:
        """Forward hook, run after an exception too: make outputs whole, leave the contexts."""
        forward = self._forwards.pop()
        forward.contexts.close()
        if output is not None:
            output = self._finished(model, forward, output)
        if forward.is_outermost:
            self.guard.leave(output)
        return output.to_tuple() if output is not None and forward.as_tuple else output

    def _finished(self, model: nn.Module, forward: _Forward, output: Any) -> Any:
        if hf_compat.is_model(model) and isinstance(output, dict):
            if self._records_attentions:
                self._gather_attentions(model, output)
                _join_hidden_states(output)
            unread = _unread.get() or not self.gather_logits
            if forward.is_outermost and not model.training and not unread:
                _gather_logits(output)
        return output

    def _gather_attentions(self, model: Any, output: dict[str, Any]) -> None:
        """Recorded attention weights `[batch, this rank's heads, queries, keys]` become whole."""
        if self.mesh.size() == 1:  # whole already, and on the way to the outputs' gradients
            return
        heads = model.config.num_attention_heads
        held = chunk_sizes(heads, self.mesh.size())[self.mesh.get_local_rank()]
        for name in ("attentions", "cross_attentions"):
            if recorded := output.get(name):
                # older versions of Transformers return None for a kernel that keeps no weights
                output[name] = tuple(
                    None if a is None else gather_region(a[:, :held], 1, heads, self.mesh)
                    for a in recorded
                )


def _join_hidden_states(output: dict[str, Any]) -> None:
    """Hidden states that were recorded while the sequence was split become whole."""
    if recorded := output.get("hidden_states"):
        output["hidden_states"] = tuple(None if x is None else whole_again(x) for x in recorded)


def _gather_logits(output: dict[str, Any]) -> None:
    for name, value in list(output.items()):
        if (dim := shard_dim(value)) is not None:
            output[name] = gather_region(local(value), dim, value.shape[dim], value.device_mesh)
        elif isinstance(value, DTensor):
            output[name] = value.full_tensor()


def argument_facts(given: dict[str, Any], *, content: bool) -> dict[str, object]:
    """What tensor-parallel ranks must have in common of a call's arguments.

    Args:
        given: name to value; tensors and plain scalars are looked at.
        content: compare values as well as shapes.
    """
    facts: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            facts[name] = f"{str(value.dtype)[6:]}{list(value.shape)}"
            if content and not isinstance(value, DTensor):
                facts[name] = f"{facts[name]} crc {checksum(value):08x}"
        elif value is None or isinstance(value, bool | int | float | str):
            facts[name] = value
    return facts
