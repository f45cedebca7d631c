"""Names of Transformers' models that are not documented, in one place.

Nothing but this file and its neighbours (`hf_construction`, `hf_masks`, `hf_trainer`) reaches into
that library's private parts, so a release that renames one is mended here. Importing them does not
import transformers; their functions do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_model(module: object) -> bool:
    """Whether `module` is a Transformers model, without importing Transformers to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def shows_progress() -> bool:
    """Whether Transformers, if it is there, is set to show progress bars."""
    logging = sys.modules.get("transformers.utils.logging")
    return logging is None or bool(logging.is_progress_bar_enabled())


def read_pickled(file: str) -> dict[str, Any]:
    """The state dict in a file that torch has pickled, mapped rather than read where it can be."""
    from transformers.modeling_utils import load_state_dict

    return dict(load_state_dict(file))


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
