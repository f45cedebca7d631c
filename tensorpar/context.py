"""`tensor_parallelism()`: a model built inside is parallel when its constructor returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from tensorpar import hf_compat, hf_construction
from tensorpar.agreement import require_agreement
from tensorpar.delayed import EmptyOnMeta
from tensorpar.given_tensors import as_transformers_loads
from tensorpar.loading import LOADED, promises
from tensorpar.mesh import is_initialized, tp_mesh, world
from tensorpar.options import Options, mark
from tensorpar.parallelize import is_settled, join, join_parameter, parallelize
from tensorpar.registry import find, fuses_attention


class _Construction:
    """What has been attached to what while the outermost context of this thread is open."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._parents: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = (
            weakref.WeakKeyDictionary()
        )
        # in order of construction, which is the same on all ranks
        self._annotated: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()

    def attached(self, parent: nn.Module, options: Options) -> None:
        """A child has been assigned to `parent` under `options`."""
        if parent in self._annotated or find(type(parent)) is None:
            return
        if options.enabled:
            self._annotated[parent] = None
        if options != self.options:
            mark(parent, options)

    def has_parent(self, child: nn.Module, parent: nn.Module) -> None:
        """Remember the way from a module to the root it was built into."""
        self._parents[child] = weakref.ref(parent)

    def finish(self) -> None:
        """Cut what no Transformers constructor has finished: models of the user's own.

        A Transformers model that has not been finished is one whose constructor raised.
        """
        for root in dict.fromkeys(self._root(module) for module in self._annotated):
            failed = hf_compat.is_model(root) and "_tensorpar_door" not in root.__dict__
            if not failed and not all(isinstance(p, DTensor) for p in root.parameters()):
                parallelize(root, options=self.options)

    def joins(self, parent: nn.Module, options: Options) -> bool:
        """Whether what `parent` is about to get must become parallel at once.

        So it is with layers that a subclass adds after its parent class's constructor, which has
        made the model parallel. Delayed initialisation needs a whole model, at the end.
        """
        delayed = options.delayed_parameter_initialization
        return options.enabled and not delayed and is_settled(self._root(parent))

    def _root(self, module: nn.Module) -> nn.Module:
        while (reference := self._parents.get(module)) is not None:
            parent = reference()
            if parent is None:
                break
            module = parent
        return module


_construction: ContextVar[_Construction | None] = ContextVar("construction", default=None)
_options: ContextVar[Options | None] = ContextVar("options", default=None)


@contextmanager
def tensor_parallelism(enabled: bool = True, **tp_config: Any) -> Iterator[None]:
    """Within: models are built tensor parallel, with the values one process would give them.

    A Transformers model is parallel, usable and saveable as soon as its constructor (or
    `from_config`, `from_pretrained`) returns. A model of the user's own that holds registered
    modules becomes parallel when the outermost context closes, since torch does not tell when a
    constructor of its ends.

    Args:
        enabled: False leaves what is built inside as it is; the innermost context wins.
        tp_config: the fields of `Options`: `check_batches`, `delayed_parameter_initialization`,
            `fused_attention`, `reproducible_dropout`, `sequence_parallel`, `gather_logits`,
            `check_replicas_every`.

    Raises:
        RuntimeError: before `init`.
        ValueError: an unknown option; or, when a model is cut, what `parallelize` refuses.
    """
    defaults = _defaults()
    outer = _construction.get()
    options = Options.of(enabled, tp_config, **defaults)
    construction = outer or _Construction(options)
    tokens = _construction.set(construction), _options.set(options)
    empty = EmptyOnMeta() if enabled and options.delayed_parameter_initialization else nullcontext()
    try:
        with empty, nullcontext() if outer else _watching():
            yield
        if outer is None:
            construction.finish()
    finally:
        _construction.reset(tokens[0])
        _options.reset(tokens[1])


def set_tensor_parallelism(module: nn.Module, enabled: bool = True, **tp_config: Any) -> None:
    """Mark a built module to be made parallel, or left alone, by `DistributedModel`.

    Its weights are kept. A mark on a module inside wins over one outside.

    Raises:
        ValueError: an unknown option.
    """
    defaults = _defaults() if is_initialized() else {}
    defaults.pop("delayed_parameter_initialization", None)  # it has its values
    mark(module, Options.of(enabled, tp_config, **defaults))


def _defaults() -> dict[str, Any]:
    """Options that the configuration has a default for."""
    config = vars(world().config)
    return {name: config[name] for name in Options.__dataclass_fields__ if name in config}


@contextmanager
def _watching() -> Iterator[None]:
    handles = (
        register_module_module_registration_hook(_on_attachment),
        register_module_parameter_registration_hook(_on_parameter),  # type: ignore[arg-type]
    )
    try:
        watcher = hf_construction.Watcher(
            _on_finished_model, _on_failed_load, _promises, _given, _fuses
        )
        with hf_construction.watch_construction(watcher):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _on_attachment(parent: nn.Module, _name: str, child: nn.Module | None) -> None:
    construction, options = _construction.get(), _options.get()
    if construction is None or options is None or child is None:
        return
    construction.has_parent(child, parent)
    construction.attached(parent, options)
    if not child._modules:  # a leaf is never a parent, but its class may be registered
        construction.attached(child, options)
    if construction.joins(parent, options):
        join(child, options)


def _on_parameter(
    module: nn.Module, _name: str, parameter: nn.Parameter | None
) -> nn.Parameter | None:
    construction, options = _construction.get(), _options.get()
    if construction is None or options is None or parameter is None:
        return parameter
    return join_parameter(module, parameter) if construction.joins(module, options) else parameter


def _fuses(module_cls: type) -> bool:
    options = _options.get()
    enabled = options is not None and options.enabled and options.fused_attention
    return enabled and fuses_attention(module_cls)


def _promises() -> Callable[..., dict[str, Any]] | None:
    options = _options.get()
    return promises if options is not None and options.enabled else None


def _given() -> Callable[[nn.Module, Any], dict[str, Any]] | None:
    options = _options.get()
    return as_transformers_loads if options is not None and options.enabled else None


def _on_failed_load(error: Exception) -> None:
    """Tell the other ranks, which would wait for this one to cut its model."""
    options = _options.get()
    if options is None or not options.enabled:
        return
    failure = {LOADED: f"{type(error).__name__}: {error}"}
    with suppress(ValueError):  # what the others raise; this rank has an error of its own
        require_agreement(failure, tp_mesh(), "from_pretrained failed")


def _on_finished_model(model: nn.Module) -> None:
    options = _options.get()
    if options is not None and options.enabled:
        parallelize(model, options=options)
