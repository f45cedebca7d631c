"""Methods of one instance's own, where its class must stay as it is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any


class Bound:
    """A function bound to the object that holds it, copied and pickled with it.

    A plain bound method in an instance's dict is pickled by its name alone, and so would come back
    as the class's. The reference is a strong one, so that `build().save_pretrained(folder)` works
    on an object that nothing else holds; a dropped object waits for the garbage collector.

    Args:
        function: at the top level of a module; takes the object first.
        owner: the object.
    """

    def __init__(self, function: Callable[..., Any], owner: object) -> None:
        self.__func__ = function
        self.__self__ = owner
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self.__signature__ = inspect.signature(MethodType(function, owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result for the object."""
        return self.__func__(self.__self__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        """A copied object has methods of its own."""
        return Bound(self.__func__, copy.deepcopy(self.__self__, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.__func__, self.__self__)
