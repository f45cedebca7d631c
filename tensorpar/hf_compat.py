"""Every name of Transformers that is not documented, in one place.

Nothing else in tensorpar reaches into that library's private parts, so a release that renames one
is mended here. Importing this file does not import transformers; its functions do.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn

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


def is_model(module: object) -> bool:
    """Whether `module` is a Transformers model, without importing Transformers to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


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
        converts = converts_weights(model, how.weight_mapping or ())
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


def shows_progress() -> bool:
    """Whether Transformers, if it is there, is set to show progress bars."""
    logging = sys.modules.get("transformers.utils.logging")
    return logging is None or bool(logging.is_progress_bar_enabled())


def read_pickled(file: str) -> dict[str, Any]:
    """The state dict in a file that torch has pickled, mapped rather than read where it can be."""
    from transformers.modeling_utils import load_state_dict

    return dict(load_state_dict(file))


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


def initialize_weights(model: Any) -> None:
    """Run Transformers' own initialiser over all modules again, whatever was done before."""
    for module in model.modules():
        module._is_hf_initialized = False
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = False
    model.initialize_weights()


def uninitialized_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `initialize_weights` would visit."""
    return [m for m in model.modules() if not getattr(m, "_is_hf_initialized", False)]


def tied_names(model: Any) -> dict[str, str]:
    """Tied parameters, each with the name under which the shared one is saved."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def attention_implementation(module: Any) -> str | None:
    """The attention that a model or one of its layers uses now; None where it has no choice."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return name if isinstance(name, str) else None


def make_static_caches_lazily(model: Any) -> None:
    """Let `generate` shape a static cache by the keys it is first given, which are this rank's.

    Transformers shapes it beforehand when prompts are read in chunks, by the config's head count.
    """
    if hasattr(model, "_get_static_cache_init_shape"):
        model.__dict__["_get_static_cache_init_shape"] = _unknown_shape


def _unknown_shape() -> None:
    return None


def converts_weights(model: Any, mapping: Sequence[Any] | None = None) -> bool:
    """Whether checkpoints of this model hold its weights merged, split or transposed.

    Args:
        model: a Transformers model.
        mapping: the conversions; by default those with which the model would be saved.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    if mapping is None:
        mapping = getattr(model, "_weight_conversions", None)
    if mapping is None:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
    return any(isinstance(conversion, WeightConverter) for conversion in mapping or ())


@contextmanager
def weights_written_by(write: Callable[..., None]) -> Iterator[None]:
    """Within: `write(tensors, file, metadata=...)` writes files of weights, for all threads."""
    from transformers import modeling_utils

    usual, modeling_utils.safe_save_file = modeling_utils.safe_save_file, write
    try:
        yield
    finally:
        modeling_utils.safe_save_file = usual


def stale_weights(variant: str | None) -> Callable[[str], bool]:
    """Whether a file's name is one that Transformers gives to a model's weights or their index."""
    marked = "" if variant is None else re.escape(f".{variant}")
    name = re.compile(
        rf"model{marked}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{marked}\.json"
    )
    return lambda file: name.fullmatch(file) is not None


def returns_dict(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this forward call asks for a `ModelOutput` rather than a tuple."""
    asked = kwargs.get("return_dict")
    return bool(model.config.return_dict if asked is None else asked)
