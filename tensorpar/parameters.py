"""Parameters as DTensors on the tp mesh, and the plain local tensors that forwards compute on.

Every parameter of a parallel model is a DTensor, sharded along one dim or replicated, so that
stock optimizers, gradient clipping, FSDP2 and distributed checkpoints work on all of them alike.
No activation is one: a forward takes `local(parameter)` and calls plain kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from typing import Any, SupportsIndex, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tensorpar.partition import shard


def stored_name(path: str) -> str:
    """The name that `state_dict` has for a path: torch's checkpoint wrapper is not a part of it."""
    return path.replace(_CHECKPOINT_PREFIX, "")


def stored_parameters(
    module: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters` under the names that `state_dict` has for them."""
    for name, parameter in module.named_parameters(remove_duplicate=remove_duplicate):
        yield stored_name(name), parameter


def placement(dim: int | None) -> Placement:
    """`Shard(dim)`, or `Replicate()` for None."""
    return Replicate() if dim is None else Shard(dim)


def local_shard(full: torch.Tensor, mesh: DeviceMesh, dim: int | None) -> torch.Tensor:
    """This rank's view of `full` along `dim`; all of it for None. Nothing is communicated."""
    if dim is None:
        return full
    return shard(full, dim, mesh.size())[mesh.get_local_rank()]


def from_local(
    shard: torch.Tensor, mesh: DeviceMesh, dim: int | None, shape: Iterable[int]
) -> DTensor:
    """The DTensor of global `shape` of which `shard` is this rank's part; differentiable."""
    shape = torch.Size(shape)
    return DTensor.from_local(
        shard,
        mesh,
        [placement(dim)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def parameter(
    shard: torch.Tensor, mesh: DeviceMesh, dim: int | None, shape: Iterable[int]
) -> nn.Parameter:
    """A DTensor parameter that owns the memory of its shard, and nothing beyond it."""
    own = shard.detach()
    if not own.is_contiguous() or own.untyped_storage().nbytes() > own.nbytes:
        own = own.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(from_local(own, mesh, dim, shape), requires_grad=shard.requires_grad)


def shard_dim(tensor: torch.Tensor) -> int | None:
    """The dim along which the tp mesh shards `tensor`; None where it is whole on every rank."""
    if not isinstance(tensor, DTensor):
        return None
    last = tensor.placements[-1]
    return last.dim if isinstance(last, Shard) else None


class _Local(torch.autograd.Function):
    """`DTensor.to_local` of a shard or a replica, at a third of its cost.

    Every parameter passes here in every step. A gradient is placed as its parameter is, so nothing
    needs to be derived; nor is anyone told that the local tensor belongs to a parameter.
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.spec = tensor._spec
        return tensor._local_tensor.view_as(tensor._local_tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> DTensor | None:
        if grad is None:
            return None
        if torch.is_grad_enabled():  # create_graph=True
            spec = ctx.spec
            return DTensor.from_local(
                grad, spec.mesh, spec.placements, shape=spec.shape, stride=spec.stride
            )
        # a spec of its own, which torch may write to
        return DTensor(grad, copy(ctx.spec), requires_grad=False)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter as a plain tensor, differentiable back to it."""
    if not isinstance(tensor, DTensor):
        return tensor
    # not `is_compiling`, which takes longer than the rest; other tracers run this code as it is
    if is_dynamo_compiling():
        return tensor.to_local()
    return _Local.apply(tensor) if torch.is_grad_enabled() else tensor._local_tensor


def flattened(shard: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """`shard.flatten(start, end)`, kept beside a parameter's shard while nothing needs gradients.

    A layer flattens the same shard in every forward, which costs as much as all its other Python.
    """
    if torch.is_grad_enabled() or type(shard) is not torch.Tensor or is_dynamo_compiling():
        return shard.flatten(start, end)
    kept: torch.Tensor | None = shard.__dict__.get("_tensorpar_flat")
    # memory may have been exchanged, by `shard.data = other`
    if kept is None or kept.data_ptr() != shard.data_ptr():
        # of a detached one: a view holds its base, and a tensor must not hold itself
        kept = shard.detach().flatten(start, end)
        if kept.data_ptr() == shard.data_ptr():
            shard.__dict__["_tensorpar_flat"] = kept
    return kept


def shard_in_place(module: nn.Module, dims: Mapping[str, int | None], mesh: DeviceMesh) -> None:
    """Replace full parameters of `module` by DTensors; a name whose parameter is None is left."""
    for name, dim in dims.items():
        full = module._parameters[name]
        if full is not None:
            shard = local_shard(full, mesh, dim)
            module._parameters[name] = parameter(shard, mesh, dim, full.shape)


#: by class and mixin; no class is kept by its entry, since users make them in loops.
_mixtures: WeakKeyDictionary[type, WeakValueDictionary[type, type]] = WeakKeyDictionary()

C = TypeVar("C", bound=type)


def mixture(cls: C) -> C:
    """Class decorator: `cls` is what `mix_in` makes of its first base (the mixin) and second."""
    mixin, base = cls.__bases__
    _mixtures.setdefault(base, WeakValueDictionary())[mixin] = cls
    return cls


class OwnMethods:
    """Mixed into the class of a model, which keeps its name; calling that class gives a plain one.

    Methods rather than attributes of the instance: those would hold what they are bound to, and a
    model that is dropped would keep its memory until the garbage collector comes by.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # a mixture inherits what its base was found to be; Transformers would look into all its
        # annotations again, some milliseconds each time
        if "_tensorpar_mixture" not in cls.__dict__:
            super().__init_subclass__(**kwargs)


def mix_in(module: nn.Module, mixin: type) -> None:
    """Put `mixin` in front of the class of `module`, in place; the instance keeps its identity."""
    base = type(module)
    if issubclass(base, mixin):
        return
    known = _mixtures.setdefault(base, WeakValueDictionary())
    if (mixed := known.get(mixin)) is None:
        namespace: dict[str, Any] = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "__reduce_ex__": _reduce,
            "_tensorpar_mixture": True,
        }
        name = f"{mixin.__name__}{base.__name__}"
        if issubclass(mixin, OwnMethods):
            name = base.__name__
            namespace |= {"__qualname__": base.__qualname__, "__new__": _plain_instance}
            namespace["__init__"] = _is_built
        mixed = type(name, (mixin, base), namespace)
        known[mixin] = mixed
    module.__class__ = mixed


def _plain_instance(cls: type, *args: Any, **kwargs: Any) -> Any:
    """`type(model)(config)` is what it would be if `model` were not parallel."""
    return next(c for c in cls.__mro__ if not issubclass(c, OwnMethods))(*args, **kwargs)


def _is_built(_: nn.Module, *args: Any, **kwargs: Any) -> None:
    """`__init__` of a mixture, which Python calls when `_plain_instance` returns one of that class.

    So it does inside `tensor_parallelism()`: a second constructor would build it anew.
    """


def _reduce(module: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    """How an instance of a mixture is copied and pickled: its class has no name to be found by."""
    cls, mixins = type(module), []
    while "_tensorpar_mixture" in cls.__dict__:
        mixin, cls = cls.__bases__
        mixins.append(mixin)
    state = object.__reduce_ex__(module, protocol)[2:]
    return _rebuild, (cls, tuple(reversed(mixins))), *state


def _rebuild(cls: type[nn.Module], mixins: tuple[type, ...]) -> nn.Module:
    module = cls.__new__(cls)
    for mixin in mixins:
        mix_in(module, mixin)
    return module
