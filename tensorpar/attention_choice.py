"""`model.set_attn_implementation` where tensorpar has a back end that Transformers does not.

Transformers cannot change the attention of GPT-J and GPT-Neo after construction; it warns and does
nothing. On a parallel model `"sdpa"` is the fused kernel and `"eager"` the model's own maths.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tensorpar.parameters import OwnMethods, mix_in
from tensorpar.registry import Plan, find


def bind(model: nn.Module) -> None:
    """Give a Transformers model its own `set_attn_implementation` if it has such attention."""
    if _fusible(model):
        mix_in(model, ChoosesAttention)


class ChoosesAttention(OwnMethods):
    """Mixed into the class of a parallel Transformers model whose attention can be fused."""

    def set_attn_implementation(
        self: Any, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any
    ) -> None:
        """`PreTrainedModel.set_attn_implementation`, which fused attention follows.

        Args:
            self: the parallel model.
            attn_implementation: `"sdpa"` or `"eager"`; anything else is Transformers' to answer.
            args: as for `PreTrainedModel.set_attn_implementation`.
            kwargs: likewise.
        """
        if attn_implementation not in ("sdpa", "eager"):
            super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
            return
        for module, fused in _fusible(self):
            mix_in(module, fused)
            module.__dict__["is_fused"] = attn_implementation == "sdpa"


def _fusible(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """The modules of a parallel model whose attention can be fused, with the class for it."""
    cut = (module for module in model.modules() if "_tensorpar_plan" in module.__dict__)
    plans = ((module, find(type(module))) for module in cut)
    return [(module, plan.fused) for module, plan in plans if isinstance(plan, Plan) and plan.fused]
