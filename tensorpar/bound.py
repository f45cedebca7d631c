"""Methods of one instance's own, which the instance can hold without holding itself."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any


class Weak:
    """A reference that does not keep its object alive, and can be copied and pickled with it."""

    def __init__(self, target: object) -> None:
        self._target = weakref.ref(target)

    def __call__(self) -> Any:
        """The object; ReferenceError if it is gone."""
        target = self._target()
        if target is None:
            raise ReferenceError("the object that this refers to has been dropped")
        return target

    def __deepcopy__(self, memo: dict[int, Any]) -> Weak:
        """A copied object is referred to by its own."""
        return Weak(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self(),)


class Bound:
    """A function bound to an object that it does not keep alive.

    An object that has a plain bound method in its own dict is a cycle: dropped, it keeps its memory
    until the garbage collector happens to run, which an allocator of a GPU does not wait for. And
    such a method is pickled by its name alone, and so would come back as the class's.

    Args:
        function: at the top level of a module; takes the object first.
        owner: the object.
    """

    def __init__(self, function: Callable[..., Any], owner: object) -> None:
        self.__func__ = function
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__signature__ = inspect.signature(MethodType(function, owner))
        self._owner = Weak(owner)

    @property
    def __self__(self) -> Any:
        """The object; ReferenceError if it is gone."""
        return self._owner()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result for the object."""
        return self.__func__(self.__self__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        """A copied object has methods of its own."""
        return Bound(self.__func__, copy.deepcopy(self.__self__, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.__func__, self.__self__)
