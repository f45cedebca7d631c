"""LoRA by peft on parallel models: the low-rank pair of a sharded layer is sharded with it.

The pair adds `B (A x)` to a layer's output (Hu et al., "LoRA", 2021). Which half is cut follows
from the layer:

| layer | A `[r, in]` | B `[out, r]` | all-reduced |
|---|---|---|---|
| column | replicated | cut as the layer's weight is | gradient of A |
| row | cut as the layer's weight is | replicated | output of A |
| row whose sum is its block's (GPT-J) | cut, a term of the sum | replicated | gradient of B |
| vocabulary head | replicated | cut by the vocabulary | gradient of A's output |
| replicated | replicated | replicated | nothing |

peft makes the pair itself, full, with the random numbers it would draw in one process; then it is
cut. peft is never imported here: torch tells when one of its tuners takes hold of a model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook

from tensorpar.adapter_files import bind_files
from tensorpar.collectives import all_reduce
from tensorpar.mesh import tp_mesh
from tensorpar.narrowing import Narrowing
from tensorpar.nn.adapters import CommonDropout, OwnDropout, SummedGradient
from tensorpar.nn.linear import ColumnParallel, RowParallel
from tensorpar.nn.vocabulary import VocabParallelHead
from tensorpar.parameters import local, mix_in, shard_in_place
from tensorpar.region import LocalParameters
from tensorpar.styles import Column, Row, VocabParallel

#: initialisations that do not read the layer's weight, which no rank has whole.
_INITIALISATIONS = (True, False, "gaussian")


def _on_attachment(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """torch calls this whenever a module is assigned to another."""
    peft = sys.modules.get("peft")
    if peft is None or child is None or name not in ("model", "base_model"):
        return
    if isinstance(parent, _tuners(peft)) and name == "model" and _is_parallel(child):
        _prepare(parent)
    elif (
        isinstance(parent, peft.PeftModel)
        and isinstance(child, peft.LoraModel)
        and _is_parallel(child)
    ):
        bind_files(parent)


register_module_module_registration_hook(_on_attachment)


def _tuners(peft: Any) -> type[nn.Module]:
    return peft.tuners.tuners_utils.BaseTuner


def _is_parallel(model: nn.Module) -> bool:
    return any("_tensorpar_door" in module.__dict__ for module in model.modules())


def _prepare(tuner: nn.Module) -> None:
    """Let a tuner make parallel layers, before it makes the first.

    Raises:
        ValueError: it is not LoRA's.
    """
    if type(tuner) is not sys.modules["peft"].LoraModel:
        raise ValueError(
            f"peft's {type(tuner).__name__} was given a tensor-parallel model, required: LoRA; "
            "other tuners would read the shapes of one rank's shards"
        )
    tuner.__dict__["_create_new_module"] = make_layer


def make_layer(config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
    """peft's layer around `target`, with the pair cut; stands in for its own function of that.

    Raises:
        ValueError: the layer is not linear, or `config` asks for more than plain LoRA.
    """
    peft: Any = sys.modules["peft"]
    make = peft.LoraModel._create_new_module
    if not any(isinstance(p, DTensor) for p in target.parameters()):
        return make(config, adapter_name, target, **kwargs)
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights = {config.init_lora_weights!r}, required: one of "
            f"{_INITIALISATIONS} on a tensor-parallel model, where no rank has a whole weight"
        )
    layer = make(config, adapter_name, _stand_in(target), **kwargs)
    if layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise ValueError(f"LoRA was asked for as {variant}, required: plain LoRA; unset its option")
    layer.base_layer = target
    adapt(layer)
    return layer


def _stand_in(target: nn.Module) -> nn.Module:
    """A full layer of the same class and sizes, for peft to look at; its weight has no storage.

    Raises:
        ValueError: `target` is not a linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(target, nn.Linear):
        stand_in: Any = nn.Linear(target.in_features, target.out_features, device="meta")
        shape = (target.out_features, target.in_features)
    elif isinstance(target, Conv1D):
        with torch.device("meta"):
            stand_in = Conv1D(target.nf, target.nx)
        shape = (target.nx, target.nf)
    else:
        raise ValueError(  # noqa: TRY004  (what the user gave is a name)
            f"target_modules of LoRA name a {type(target).__name__}, required: linear layers; "
            "list others in modules_to_save to train them whole"
        )
    weight: Any = target.weight
    one = torch.empty((), dtype=weight.dtype, device=weight.device)
    stand_in.weight = nn.Parameter(one.expand(shape))
    stand_in.bias = None if target.bias is None else nn.Parameter(one.expand(shape[:1]))
    return stand_in


def adapt(layer: Any) -> None:
    """Make one of peft's LoRA layers, full and plain, fit the parallel layer it is around."""
    mix_in(layer, ParallelLora)
    for adapter_name in layer.lora_A:
        layer.cut(adapter_name)


class ParallelLora:
    """Mixed into peft's LoRA layer around a parallel layer."""

    lora_A: nn.ModuleDict  # noqa: N815
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    fan_in_fan_out: bool

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA only; peft refuses others with the name of what was asked for."""
        return {(): None}

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add one more adapter: made by peft, then cut."""
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        self.cut(adapter_name)

    def cut(self, adapter_name: str) -> None:
        """Make the pair of an adapter parallel as its layer is."""
        base = self.get_base_layer()  # type: ignore[attr-defined]
        down, up = self.lora_A[adapter_name], self.lora_B[adapter_name]
        narrowing = Narrowing(tp_mesh())
        style, sizes = base.__dict__.get("style"), base.__dict__.get("axis_sizes", {"b": 1})
        features_are_local = False
        if isinstance(base, ColumnParallel):
            narrowing.convert(up, _plainly_stored(style or Column()), sizes, entered=True)
            up.__dict__["gather_output"] = base.gather_output
            _sum_gradient(down, copy_input=base.copy_input)
        elif isinstance(base, RowParallel):
            features_are_local = True
            narrowing.convert(down, _plainly_stored(style or Row()), sizes, entered=True)
            if base.partial:
                _sum_gradient(up)
            else:
                narrowing.replicate(up)
        else:
            if isinstance(base, VocabParallelHead):
                narrowing.convert(up, VocabParallel(), sizes, entered=False)
            narrowing.replicate(down)
            narrowing.replicate(up)
        self._place_dropout(adapter_name, own=features_are_local)

    def _place_dropout(self, adapter_name: str, *, own: bool) -> None:
        dropout = self.lora_dropout[adapter_name]
        if isinstance(dropout, nn.Dropout):
            p = dropout.p
            self.lora_dropout[adapter_name] = OwnDropout(p, tp_mesh()) if own else CommonDropout(p)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the pairs to the weight in place.

        Args:
            safe_merge: look at the result on all ranks before anything is changed.
            adapter_names: by default all that are active.

        Raises:
            ValueError: with `safe_merge`, some element would not be finite; on every rank.
        """
        for name in (adapter_names or self.active_adapters) if safe_merge else ():  # type: ignore[attr-defined]
            if name in self.lora_A and not self._stays_finite(name):
                raise ValueError(f"merging adapter {name} would give weights that are not finite")
        super().merge(adapter_names=adapter_names)  # type: ignore[misc]

    def _stays_finite(self, adapter: str) -> bool:
        weight = self.get_base_layer().weight  # type: ignore[attr-defined]
        merged = local(weight) + local(self.get_delta_weight(adapter))
        bad = (~merged.isfinite()).sum()
        return int(all_reduce(bad, tp_mesh())) == 0

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`B A` as the layer's weight is laid out and placed: a DTensor."""
        weight = self.get_base_layer().weight  # type: ignore[attr-defined]
        down: Any = local(self.lora_A[adapter].weight).flatten(1)  # type: ignore[arg-type]
        up: Any = local(self.lora_B[adapter].weight).flatten(0, -2)  # type: ignore[arg-type]
        # as peft does, since products in half precision are slow on a CPU
        wide = up.device.type == "cpu" and up.dtype in (torch.float16, torch.bfloat16)
        delta = (up.float() @ down.float()).to(up.dtype) if wide else up @ down
        if isinstance(self.get_base_layer(), LocalParameters) and self.fan_in_fan_out:  # type: ignore[attr-defined]
            delta = delta.T  # a replicated layer's weight is still in Hugging Face's layout
        shard = (delta * self.scaling[adapter]).reshape(local(weight).shape)
        return DTensor.from_local(
            shard,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )


def _plainly_stored(style: Column | Row) -> Column | Row:
    return replace(style, stored="oi")


def _sum_gradient(module: nn.Module, *, copy_input: bool = False) -> None:
    mesh = tp_mesh()
    shard_in_place(module, {"weight": None, "bias": None}, mesh)
    mix_in(module, SummedGradient)
    module.__dict__.update(mesh=mesh, copy_input=copy_input)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within: layers that peft has wrapped stand in their own places; then the pairs are cut.

    For a model that got its adapters before it becomes parallel.

    Raises:
        ValueError: it has adapters that do not shard. The model is unchanged then.
    """
    peft: Any = sys.modules.get("peft")
    places = [] if peft is None else list(_wrapped(model, peft))
    for parent, name, layer in places:
        parent._modules[name] = layer.get_base_layer()
    try:
        yield
    finally:
        for parent, name, layer in places:
            parent._modules[name] = layer
    for _, _, layer in places:
        adapt(layer)
    for module in model.modules() if places else ():
        if isinstance(module, peft.LoraModel):
            _prepare(module)
        elif isinstance(module, peft.PeftModel):
            bind_files(module)


def _wrapped(model: nn.Module, peft: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    kinds = peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.AuxiliaryTrainingWrapper
    for parent in model.modules():
        for name, child in parent._modules.items():
            if not isinstance(child, kinds) or isinstance(child, ParallelLora):
                continue
            if type(child) is not peft.tuners.lora.Linear or child.lora_variant:
                raise ValueError(
                    f"{name} of {type(parent).__name__} is peft's {type(child).__name__}, "
                    "required: plain LoRA on linear layers; make the model parallel first, then "
                    "call get_peft_model"
                )
            yield parent, name, child
