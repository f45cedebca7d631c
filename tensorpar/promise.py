"""Tensors without values that know where these are, so that a model can be cut before it is read.

Transformers' own code matches, renames, ties and reports such tensors as if they were whole; none
of that looks at a value. What does look at one gets it from the origin, or fails as meta tensors
do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch

#: operations whose result has the same values, and so the same origin.
_SAME_VALUES = (
    torch.Tensor.detach,
    torch.Tensor.requires_grad_,
    torch.Tensor.contiguous,
    torch.Tensor.to,
)


class Promise(torch.Tensor):
    """A tensor on meta, of a true shape and dtype.

    Attributes:
        origin: where the values are; None for what was computed from a promise.
        answers: what a kind of promise knows without values, by the function that asks.
    """

    origin: Any = None
    answers: ClassVar[Mapping[Any, Callable[..., Any]]] = {}

    @classmethod
    def of(cls, origin: Any, shape: Sequence[int], dtype: torch.dtype) -> Self:
        """A promise of a tensor."""
        promise = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(cls)
        promise.origin = origin
        return promise

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Keep the origin where the values stay the same; answer what needs none."""
        kwargs = dict(kwargs or {})
        promise = args[0] if args and isinstance(args[0], Promise) else None
        if promise is None or promise.origin is None:
            return super().__torch_function__(func, types, args, kwargs)
        if (answer := type(promise).answers.get(func)) is not None:
            return answer(*args, **kwargs)
        if func is torch.Tensor.to:
            args, kwargs = _without_device(args, kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        whole = func is torch.Tensor.__getitem__ and args[1] is Ellipsis
        if (whole or func in _SAME_VALUES) and isinstance(result, Promise):
            result.origin = promise.origin
        return result

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Without values."""
        return f"{type(self).__name__}({self.origin}, {tuple(self.shape)}, {self.dtype})"


def origin_of(tensor: torch.Tensor) -> Any:
    """Where the values of a promise are; None for any other tensor."""
    return tensor.origin if isinstance(tensor, Promise) else None


def _without_device(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `Tensor.to` that change the dtype only: values go to no device yet."""
    kept = tuple(arg for arg in args[1:] if not isinstance(arg, torch.device | str | int))
    return (args[0], *kept), {name: value for name, value in kwargs.items() if name != "device"}
