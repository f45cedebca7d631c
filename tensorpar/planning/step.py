"""One training step, watched: on a pretended world for a plan, on a real one to check it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from tensorpar.context import tensor_parallelism
from tensorpar.data_parallel import DataParallel, require_even_batches
from tensorpar.empty_shards import empty_shard
from tensorpar.mesh import world
from tensorpar.planning.counting import Kept, LiveBytes, Sent, Traffic, num_bytes
from tensorpar.planning.pretence import NoStorage, pretended_world
from tensorpar.planning.wanted import Wanted

_ATEN = torch.ops.aten
#: torch knows the floating-point operations of the GPU's fused attention only.
_FLOP_ON_CPU = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Figures:
    """Of one rank and one training step; bytes, unless said otherwise.

    Attributes:
        num_parameters: elements that this rank holds.
        parameters: what it holds of them.
        gradients: after backward.
        optimizer: state after the step.
        activations: what forward keeps for backward, each storage once, beyond parameters,
            buffers and the batch.
        peak: the most that is held at once in a step that is not the first.
        flop: floating-point operations of products and attention, recomputed ones too.
        sent: collectives by kind.
        notes: warnings of the model's construction.
    """

    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    flop: int
    sent: Mapping[str, Sent]
    notes: tuple[str, ...] = ()


def planned(wanted: Wanted) -> Figures:
    """The figures of the rank that holds the most; nothing is allocated.

    Raises:
        RuntimeError: this process is part of a world.
        ValueError, AttributeError: what construction of the parallel model raises.
    """
    nothing = NoStorage()
    with pretended_world(wanted.tp, wanted.dp), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        dp_mesh = world().mesh["dp"]
        with nothing, tensor_parallelism(sequence_parallel=wanted.sequence_parallel):
            model = built(wanted)
        if wanted.dp > 1:  # makes meshes, which need values
            if (problem := empty_shard(model)) is not None:
                warnings.warn(problem, stacklevel=1)
            DataParallel(wanted.data_parallel).apply(model, dp_mesh)
        with nothing:
            given = batch(wanted)

            def forward() -> Any:
                if wanted.dp > 1:
                    require_even_batches(given, dp_mesh)
                return model(**given)

            notes = [str(one.message) for one in caught if one.category is UserWarning]
            return watched(model, optimizer_of(wanted, model), given, forward, notes=notes)


def built(wanted: Wanted) -> nn.Module:
    """The model in training, as Transformers constructs it."""
    import transformers

    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted.dtype)
    try:
        model: Any = getattr(transformers, wanted.head)(wanted.config)
    finally:
        torch.set_default_dtype(before)
    if wanted.gradient_checkpointing:
        # its name before Transformers called it so, and deprecated since
        older = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", older)()
    return model.train()


def optimizer_of(wanted: Wanted, model: nn.Module) -> torch.optim.Optimizer:
    """As named in `Wanted.optimizer`."""
    if wanted.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), fused=True)
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def batch(wanted: Wanted) -> dict[str, Tensor]:
    """Forward arguments: tokens, and labels where the model predicts tokens or sentences."""
    tokens = torch.zeros(wanted.batch, wanted.sequence, dtype=torch.int64)
    rows = torch.zeros(wanted.batch, dtype=torch.int64)
    by_kind = {
        "LM": {"labels": tokens},
        "PreTraining": {"labels": tokens, "next_sentence_label": rows},
        "NextSentence": {"labels": rows},
        "TokenClassification": {"labels": tokens},
        "SequenceClassification": {"labels": rows},
        "QuestionAnswering": {"start_positions": rows, "end_positions": rows},
    }
    extra = (labels for kind, labels in by_kind.items() if kind in wanted.head)
    return {"input_ids": tokens, **next(extra, {})}


def watched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Mapping[str, Tensor],
    forward: Callable[[], Any],
    notes: tuple[str, ...] | list[str] = (),
) -> Figures:
    """Two training steps: what the first keeps and computes, and the rest of the second.

    Optimizer state exists from the end of the first step on, so a step's peak is the second's.
    torch's counter of operations hangs hooks on modules, which keep a recomputed block alive longer
    than it is without them: it may not watch the step whose peak is taken.

    Args:
        model: parallel, in training.
        optimizer: of its parameters.
        given: the batch, which counts for no activation.
        forward: calls the model with it; the output's loss, or the sum of its first tensor, is
            what backward begins from.
        notes: passed through.
    """
    flop = FlopCounterMode(display=False, custom_mapping=_FLOP_ON_CPU)
    with flop:
        activations = _kept(model, optimizer, given, forward)
    state = [value for one in optimizer.state.values() for value in one.values()]
    tensors = [value for value in state if isinstance(value, Tensor)]
    live = LiveBytes([*_lasting(model), *tensors, *given.values()])
    with live, Traffic() as traffic:
        traffic.phase = "forward"
        loss = _loss(forward())
        traffic.phase = "backward"
        loss.backward()
        del loss
        gradients = num_bytes(p.grad for p in model.parameters())
        traffic.phase = "optimizer"
        optimizer.step()
        optimizer.zero_grad()
    parameters = list(model.parameters())
    return Figures(
        num_parameters=sum(num_bytes([p]) // p.element_size() for p in parameters),
        parameters=num_bytes(parameters),
        gradients=gradients,
        optimizer=num_bytes(state),
        activations=activations,
        peak=live.peak,
        flop=flop.get_total_flops(),
        sent=dict(sorted(traffic.sent.items())),
        notes=tuple(dict.fromkeys(notes)),
    )


def _kept(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Mapping[str, Tensor],
    forward: Callable[[], Any],
) -> int:
    with Kept() as kept:
        loss = _loss(forward())
    activations = kept.num_bytes(apart_from=[*_lasting(model), *given.values()])
    del kept
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return activations


def _lasting(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _loss(output: Any) -> Tensor:
    loss = output.get("loss")
    return output[0].sum() if loss is None else loss
