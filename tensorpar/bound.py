"""Methods of one instance, as a model whose class stays its own needs them.

A plain bound method in an instance's `__dict__` is pickled by its name alone, and so would come
back as the class's method.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class BoundMethod:
    """A function with its first argument; copied and pickled with it.

    Args:
        function: a top-level function.
        instance: its first argument.
    """

    def __init__(self, function: Callable[..., Any], instance: object) -> None:
        functools.update_wrapper(self, function)
        self.__func__ = function
        self.__self__ = instance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function on the instance."""
        return self.__func__(self.__self__, *args, **kwargs)


def make_methods_portable(module: nn.Module) -> None:
    """Exchange the bound methods that an instance holds for ones that can be copied and pickled."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, MethodType) and value.__self__ is module:
            module.__dict__[name] = BoundMethod(value.__func__, module)
