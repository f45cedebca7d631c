"""Being told of every Transformers model that is built or loaded, and what it is loaded from.

While someone watches, four methods of `PreTrainedModel` are others. A release that changes one is
mended here.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

from tensorpar import hf_compat

_lock = threading.Lock()
_watchers: list[Watcher] = []
_originals: dict[str, Any] = {}
#: methods of `PreTrainedModel` that are others while a context is open.
_PATCHED = (
    "post_init",
    "from_pretrained",
    "_load_pretrained_model",
    "_check_and_adjust_attn_implementation",
)


def model_class() -> type[nn.Module]:
    """`PreTrainedModel`; raises RuntimeError if this version lacks what tensorpar builds on."""
    import transformers
    from transformers.modeling_utils import PreTrainedModel

    for name in (*_PATCHED, "save_pretrained", "initialize_weights"):
        if not hasattr(PreTrainedModel, name):
            raise RuntimeError(
                f"transformers = {transformers.__version__} has no PreTrainedModel.{name}, "
                "required: a version within tensorpar's range (setup.cfg)"
            )
    return PreTrainedModel


@dataclass(frozen=True)
class Watcher:
    """Who is told of models under construction, in the thread that builds them.

    Attributes:
        finished: called with a model when its outermost constructor is done: at its own
            `post_init`, after initialisation and tying, or, if it is loaded, when
            `from_pretrained` returns.
        failed: called with the exception when `from_pretrained` raises; the exception goes on.
        promises: makes of checkpoint files the state dict to load, given `may_map`, whether these
            may stay mapped; None to load as ever.
        given: makes of a state dict that is given the one to load; None to load it as it is.
        fuses: whether a class that Transformers has no sdpa for gets one, and may be asked to.
    """

    finished: Callable[[nn.Module], None]
    failed: Callable[[Exception], None]
    promises: Callable[[], Callable[..., dict[str, Any]] | None]
    given: Callable[[], Callable[[nn.Module, Any], dict[str, Any]] | None]
    fuses: Callable[[type], bool]


@contextmanager
def watch_construction(watcher: Watcher) -> Iterator[None]:
    """Within: `watcher` is told; Transformers' own classes are put back at the end."""
    with _lock:
        if not _watchers:
            _patch()
        _watchers.append(watcher)
    try:
        yield
    finally:
        with _lock:
            _watchers.remove(watcher)
            if not _watchers:
                _restore()


def _patch() -> None:
    cls: Any = model_class()
    _originals.update({name: cls.__dict__[name] for name in _PATCHED})
    post_init, from_pretrained = cls.post_init, cls.from_pretrained.__func__
    choose_attention, load = cls._check_and_adjust_attn_implementation, cls._load_pretrained_model
    loading = threading.local()

    @functools.wraps(post_init)
    def watched_post_init(self: nn.Module) -> None:
        post_init(self)
        if not getattr(loading, "depth", 0) and not _inside_another_constructor(self, cls):
            _tell(self)

    @functools.wraps(from_pretrained)
    def watched_from_pretrained(model_cls: Any, *args: Any, **kwargs: Any) -> Any:
        loading.depth = getattr(loading, "depth", 0) + 1
        try:
            result = from_pretrained(model_cls, *args, **kwargs)
        except Exception as error:
            if loading.depth == 1:
                for watcher in tuple(_watchers):
                    watcher.failed(error)
            raise
        finally:
            loading.depth -= 1
        model = result[0] if isinstance(result, tuple) else result
        if not loading.depth:
            _tell(model)
        return result

    @functools.wraps(choose_attention)
    def watched_choice(self: Any, asked: str | None, *args: Any, **kwargs: Any) -> Any:
        if asked == "sdpa" and not self._supports_sdpa:
            # what it calls eager is the maths that a fused class replaces
            asked = "eager" if any(w.fuses(type(self)) for w in tuple(_watchers)) else asked
        return choose_attention(self, asked, *args, **kwargs)

    cls._check_and_adjust_attn_implementation = watched_choice
    cls._load_pretrained_model = staticmethod(_watched_load(load, loading))
    cls.post_init = watched_post_init
    cls.from_pretrained = classmethod(watched_from_pretrained)


def _watched_load(load: Callable[..., Any], loading: threading.local) -> Callable[..., Any]:
    """`_load_pretrained_model`, which gets promises in place of files where a watcher has some.

    Nothing is promised to a model inside another that is being loaded: its values may be read
    before anything is cut.
    """

    @functools.wraps(load)
    def watched_load(
        model: Any, state_dict: Any, files: Any, how: Any, *args: Any, **kwargs: Any
    ) -> Any:
        watchers = tuple(_watchers) if loading.depth == 1 else ()
        promises = next(filter(None, (w.promises() for w in watchers)), None)
        given = next(filter(None, (w.given() for w in watchers)), None)
        if given is not None and state_dict is not None:
            state_dict = given(model, state_dict)
        if promises is None:
            return load(model, state_dict, files, how, *args, **kwargs)
        _refuse_placement(how)
        converts = hf_compat.converts_weights(model, how.weight_mapping or ())
        if state_dict is not None or not files or converts:
            return load(model, state_dict, files, how, *args, **kwargs)
        with _without_progress():
            how = dataclasses.replace(how, device_map=None)
            promised = promises(files, may_map=not getattr(how, "disable_mmap", None))
            return load(model, promised, files, how, *args, **kwargs)

    return watched_load


def _refuse_placement(how: Any) -> None:
    """Raise ValueError for ways of loading whose result could not be cut."""
    devices = {str(device) for device in (how.device_map or {}).values()}
    if how.hf_quantizer is not None:
        raise ValueError(
            "quantized or GGUF weights inside tensor_parallelism(), required: plain ones, since "
            "packed weights cannot be sharded; load and dequantize them outside, save_pretrained, "
            "and load that folder"
        )
    if how.device_mesh is not None:
        raise ValueError(
            "distributed_config, tp_plan or device_mesh inside tensor_parallelism(), required: "
            "none; the degree is that of tensorpar.init"
        )
    if len(devices) > 1 or devices & {"disk", "meta"}:
        raise ValueError(
            f"device_map = {how.device_map} inside tensor_parallelism(), required: none; each "
            "rank's part is placed on its own device"
        )


@contextmanager
def _without_progress() -> Iterator[None]:
    """Within: no bars for what is only promised."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _restore() -> None:
    cls: Any = model_class()
    for name, original in _originals.items():
        setattr(cls, name, original)
    _originals.clear()


def _tell(model: nn.Module) -> None:
    for watcher in tuple(_watchers):
        watcher.finished(model)


def _inside_another_constructor(model: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the constructor of another model waits for this one's: an inner model.

    The call stack itself is asked; a record kept beside it would go stale with an exception.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "__init__" and frame.f_code.co_varnames:
            owner = frame.f_locals.get(frame.f_code.co_varnames[0])
            if owner is not model and isinstance(owner, cls):
                return True
        frame = frame.f_back
    return False
