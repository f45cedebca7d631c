"""Modules that are replaced whole by a class of the user's: `tp_register_with_module`."""

from __future__ import annotations

from typing import Any

from torch import nn

from tensorpar.options import Options, effective
from tensorpar.registry import Replacement, constructor_arguments, find


def replace_children(root: nn.Module, options: Options) -> None:
    """Put stand-ins in the place of all instances of replaced classes under `root`.

    A module attached at several places is replaced by one stand-in. The stand-in draws its own
    initial values.

    Raises:
        ValueError: an instance is older than its class's registration, or is `root` itself.
    """
    stand_ins: dict[nn.Module, nn.Module] = {}
    for parent, own in effective(root, options).items():
        for name, child in list(parent._modules.items()):
            if child is None or not (own := child.__dict__.get("_tensorpar_options", own)).enabled:
                continue
            if child not in stand_ins:
                stand_ins[child] = _stand_in(child)
            parent._modules[name] = stand_ins[child]
    if options.enabled and isinstance(find(type(root)), Replacement):
        raise ValueError(
            f"{type(root).__name__} is replaced as a child of another module, not on its own; "
            "construct its replacement directly"
        )


def _stand_in(child: nn.Module) -> nn.Module:
    """The replacement of `child`, or `child` where there is none or `init_hook` declines."""
    replacement = find(type(child))
    if not isinstance(replacement, Replacement) or type(child) is replacement.dist_module:
        return child
    args, kwargs = constructor_arguments(child)
    if replacement.init_hook is not None:
        mapped = replacement.init_hook(*args, **kwargs)
        if mapped is None:
            return child
        args, kwargs = mapped
    new = replacement.dist_module(*args, **kwargs)
    new.train(child.training)
    new.__dict__["_tensorpar_replacement"] = replacement
    _adapt_calls(new, replacement)
    return new


def _adapt_calls(module: nn.Module, replacement: Replacement) -> None:
    forward_hook, return_hook = replacement.forward_hook, replacement.return_hook
    if forward_hook is not None:

        def adapt_arguments(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return forward_hook(*args, **kwargs)

        module.register_forward_pre_hook(adapt_arguments, prepend=True, with_kwargs=True)
    if return_hook is not None:

        def adapt_output(_: nn.Module, _args: Any, output: Any) -> Any:
            return return_hook(output)

        module.register_forward_hook(adapt_output)


def translate_functions(model: nn.Module) -> list[tuple[Any, Any]]:
    """`(to_hf, from_hf)` of every replaced class that occurs in `model`, each once."""
    found: dict[tuple[Any, Any], None] = {}
    for module in model.modules():
        replacement = module.__dict__.get("_tensorpar_replacement")
        if replacement is not None and replacement.translate_functions is not None:
            found[replacement.translate_functions] = None
    return list(found)
