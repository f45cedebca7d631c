"""The registry: one plan per module class says which child becomes which parallel layer.

Plans are found along the method resolution order, so a subclass is served by its parent's plan.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tensorpar.styles import Style


@dataclass(frozen=True)
class Stream:
    """Where a model's sequence may be split: `sequence_parallel=True`.

    It is split before the first block and whole again after the norm, or the last block. Between
    the blocks' regions every position must be computed by itself, from activations
    `[batch, sequence, ...]` that a block takes as its first argument and returns, alone or as the
    first of a tuple.

    Args:
        blocks: the module's child that lists its blocks.
        norm: the child that the last block's output passes next, if there is one.
    """

    blocks: str
    norm: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is known of one module class.

    Attributes:
        children: style by the child's name; dots lead into children of children.
        divide: integer attributes of the module that shrink to this rank's share.
        enter: forward arguments that pass the copy region at the module's door.
        mixin: a class mixed in front of the module's own, whose forward it replaces: where the
            maths must change. It enters the parallel region itself.
        fused: a class mixed in front whose attention is fused, unless that is switched off.
        stream: where the sequence may be split, in a module that lists a model's blocks.
        at: where state dicts keep instances, as the end of the module path (`"h.*.attn"`), with
            the attributes that instances there have. What no module is at hand for, translation,
            reads these.
    """

    children: Mapping[str, Style]
    divide: tuple[str, ...] = ()
    enter: tuple[str, ...] = ()
    mixin: type | None = None
    fused: type | None = None
    stream: Stream | None = None
    at: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Replacement:
    """A module class that is replaced whole; see `tp_register_with_module`."""

    dist_module: type[nn.Module]
    init_hook: Callable[..., Any] | None = None
    forward_hook: Callable[..., Any] | None = None
    return_hook: Callable[[Any], Any] | None = None
    translate_functions: tuple[Callable[..., Any], Callable[..., Any]] | None = None


Key = type | str
_plans: dict[Key, Plan | Replacement] = {}


def register(
    module: type[nn.Module] | str,
    *,
    divide: tuple[str, ...] = (),
    enter: tuple[str, ...] = (),
    mixin: type | None = None,
    fused: type | None = None,
    stream: Stream | None = None,
    at: Mapping[str, Mapping[str, Any]] | None = None,
    **children: Style,
) -> None:
    """Make a module class tensor parallel by annotating its children; its forward stays its own.

    Args:
        module: the class, or its dotted name, which is not imported.
        divide: integer attributes its forward reads (head counts, split sizes) that must become
            this rank's share. In a plan with heads they are multiples of the head count.
        enter: names of forward arguments, the same on all ranks, that the column layers read; the
            module may then have no parameter of its own. Empty: each column layer enters by
            itself, at the price of an all-reduce each in backward, and the module's own
            parameters count as used outside the sharded part.
        mixin: a class whose forward replaces the module's own, where its maths must change.
        fused: a class whose attention maths does, unless `fused_attention=False`.
        stream: where the sequence may be split, in a module that lists a model's blocks. A `mixin`
            within them enters and leaves its regions by `tensorpar.rows`.
        at: where a state dict keeps instances; only translation without a model needs it.
        children: style by child name: `qkv=Column(blocks=3, heads="num_heads")`. A double
            underscore stands for a dot: `output__dense=Row()`.

    Raises:
        ValueError: the class is registered already, or no child is named.
        TypeError: a child's style is not a style.
    """
    for name, style in children.items():
        if not isinstance(style, Style):
            raise TypeError(f"{name} = {style!r}, required: Column(), Row() or VocabParallel()")
    if not children and fused is None and stream is None:
        raise ValueError(f"{_name(module)}: no children, required: at least one child=Style()")
    named = {name.replace("__", "."): style for name, style in children.items()}
    _add(module, Plan(named, divide, enter, mixin, fused, stream, at or {}))


def tp_register_with_module(
    module_cls: type[nn.Module],
    dist_module: type[nn.Module],
    init_hook: Callable[..., Any] | None = None,
    forward_hook: Callable[..., Any] | None = None,
    return_hook: Callable[[Any], Any] | None = None,
    translate_functions: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> None:
    """Replace every `module_cls` built under `tensor_parallelism()` by a `dist_module`.

    Args:
        module_cls: the class to replace.
        dist_module: the class that stands in for it, built of parallel layers.
        init_hook: maps the arguments of `module_cls.__init__` to `(args, kwargs)` for
            `dist_module`, or returns None to leave that instance as it is.
        forward_hook: maps the arguments of `module_cls.forward` to `(args, kwargs)`.
        return_hook: maps what `dist_module` returns to what `module_cls` would.
        translate_functions: `(to_hf, from_hf)`, each a function of a state dict; applied when the
            model is saved for Hugging Face and when such a state dict is loaded.

    Raises:
        ValueError: `module_cls` is registered already.
    """
    replacement = Replacement(
        dist_module, init_hook, forward_hook, return_hook, translate_functions
    )
    _add(module_cls, replacement)
    _remember_arguments(module_cls)


def tp_register(
    dist_module: type[nn.Module],
    init_hook: Callable[..., Any] | None = None,
    forward_hook: Callable[..., Any] | None = None,
    return_hook: Callable[[Any], Any] | None = None,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: replace the class by `dist_module`, as `tp_register_with_module` does."""

    def decorate(module_cls: type[nn.Module]) -> type[nn.Module]:
        tp_register_with_module(module_cls, dist_module, init_hook, forward_hook, return_hook)
        return module_cls

    return decorate


def unregister(module: type[nn.Module] | str) -> None:
    """Forget a class; raises KeyError if it is not registered."""
    if isinstance(_plans.pop(module), Replacement):
        module.__init__ = module.__init__.__wrapped__  # type: ignore[misc, method-assign, union-attr]


_arguments: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def _remember_arguments(module_cls: type[nn.Module]) -> None:
    """From now on instances know with what they were built, so that a stand-in can be."""
    init = module_cls.__init__

    @functools.wraps(init)
    def remembering_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _arguments[self] = args, kwargs

    module_cls.__init__ = remembering_init  # type: ignore[method-assign]


def constructor_arguments(module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With what an instance of a replaced class was built.

    Raises:
        ValueError: it was built before its class was registered.
    """
    if module not in _arguments:
        raise ValueError(
            f"a {type(module).__name__} was built before its class was registered, so the "
            "arguments of its replacement are unknown; register the class first"
        )
    return _arguments[module]


def find(module_cls: type) -> Plan | Replacement | None:
    """What is registered for the class or, along its method resolution order, for a parent."""
    for cls in module_cls.__mro__:
        for key in (cls, f"{cls.__module__}.{cls.__qualname__}"):
            if key in _plans:
                return _plans[key]
    return None


def plans(prefix: str) -> Iterator[Plan]:
    """The plans registered under dotted names that start with `prefix`: one family's table."""
    for key, plan in _plans.items():
        if isinstance(key, str) and key.startswith(prefix) and isinstance(plan, Plan):
            yield plan


def require_classes(model_cls: type) -> None:
    """Raise unless the modules that define a model class have every class a plan names there.

    What the library has renamed would not be found, and stay whole on every rank without a word.

    Raises:
        AttributeError: a class is missing.
    """
    for home in dict.fromkeys(cls.__module__ for cls in model_cls.__mro__):
        module = sys.modules.get(home)
        named = (key.rpartition(".") for key in _plans if isinstance(key, str))
        missing = [name for path, _, name in named if path == home and not hasattr(module, name)]
        if missing:
            package = home.partition(".")[0]
            version = getattr(sys.modules.get(package), "__version__", "unknown")
            raise AttributeError(
                f"{home} has no {missing}, required by the plans of {model_cls.__name__}; "
                f"{package} = {version}. Register plans that fit this version"
            )


def fuses_attention(module_cls: type) -> bool:
    """Whether the family of a model class has a fused attention of ours."""
    return any(plan.fused is not None for plan in plans(f"{module_cls.__module__}."))


def _add(module: type[nn.Module] | str, plan: Plan | Replacement) -> None:
    name = _name(module)
    # two classes may bear one name (local ones do); a name and a class may not
    same_name = (key for key in _plans if _name(key) == name)
    if module in _plans or any(
        isinstance(key, str) or isinstance(module, str) for key in same_name
    ):
        raise ValueError(f"{name} is registered already; tensorpar.unregister it first")
    _plans[module] = plan


def _name(module: Key) -> str:
    return module if isinstance(module, str) else f"{module.__module__}.{module.__qualname__}"
