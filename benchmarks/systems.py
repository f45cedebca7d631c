"""The contestants of the speed benchmarks: one way each to make a model run on some ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from contest import AbsentError, Seat
from models import Shape


@dataclass
class Training:
    """A model and what happens to it after backward.

    Attributes:
        model: called with a batch.
        backward: of a loss.
        update: clips to norm 1, steps AdamW and clears the gradients.
        forward: within which the model computes its loss.
    """

    model: Any
    backward: Callable[[torch.Tensor], None]
    update: Callable[[], None]
    forward: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def transformers_alone(shape: Shape, _: Seat) -> Training:
    return training(shape.build())


def tensorpar(shape: Shape, seat: Seat, **options: Any) -> Training:
    import tensorpar

    tensorpar.init(tensor_parallel_degree=seat.num_ranks, device_type="cpu")
    with tensorpar.tensor_parallelism(**options):
        return training(shape.build())


def transformers_tp(shape: Shape, seat: Seat) -> Training:
    from peers import transformers_tp as peer

    return _sharded_by(peer.parallel, shape, seat)


def parallelize_module(shape: Shape, seat: Seat) -> Training:
    from peers import parallelize_module as peer
    from torch.distributed.tensor.parallel import loss_parallel

    made = _sharded_by(peer.parallel, shape, seat)
    made.forward = loss_parallel
    made.backward = _within(loss_parallel, made.backward)
    return made


def parallelize_module_gathering(shape: Shape, seat: Seat) -> Training:
    from peers import parallelize_module as peer

    return _sharded_by(partial(peer.parallel, whole_logits=True), shape, seat)


def deepspeed(shape: Shape, seat: Seat) -> Training:
    from peers import deepspeed_autotp as peer

    if shape.family == "gpt2":
        raise AbsentError("AutoTP does not shard Conv1D")
    model = shape.build()
    engine = peer.engine(model, peer.optimizer, shape.batch, seat.num_ranks)
    return Training(engine, engine.backward, engine.step)


#: by name, who can take part; the first is the limit.
SYSTEMS: dict[str, Callable[[Shape, Seat], Training]] = {
    "one process": transformers_alone,
    "tensorpar": tensorpar,
    "Transformers tp": transformers_tp,
    "parallelize_module": parallelize_module,
    "DeepSpeed AutoTP": deepspeed,
}
#: the first of them, with no more than the cores of one rank.
ONE_CORE = "one process, one core"
PEERS = [name for name in SYSTEMS if name not in ("one process", "tensorpar")]
#: for forwards with labels: logits whole on every rank, and as a training step leaves them.
EVALUATING = {**SYSTEMS, "tensorpar, sharded": partial(tensorpar, gather_logits=False)}
#: for generation, which looks at whole logits.
GENERATING = {**SYSTEMS, "parallelize_module": parallelize_module_gathering}


def _sharded_by(shard: Callable[..., None], shape: Shape, seat: Seat) -> Training:
    from peers.plans import PLANS, clip_
    from torch.distributed.device_mesh import init_device_mesh

    model = shape.build()
    shard(model, PLANS[shape.family], init_device_mesh("cpu", (seat.num_ranks,)))
    parameters = list(model.parameters())
    return training(model, lambda: clip_(parameters, 1.0))


def training(model: torch.nn.Module, clip: Callable[[], Any] | None = None) -> Training:
    """Plain PyTorch around a model: AdamW, and torch's clipping unless another is given."""
    parameters = list(model.parameters())
    # AdamW's fused kernel takes DTensors and plain tensors, but not in one list
    kinds = [[x for x in parameters if hasattr(x, "device_mesh") is kind] for kind in (True, False)]
    groups = [{"params": kind} for kind in kinds if kind]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    clip = clip or (lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0))

    def update() -> None:
        clip()
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, torch.Tensor.backward, update)


def _within(
    context: Callable[[], AbstractContextManager[Any]], call: Callable[..., Any]
) -> Callable[..., Any]:
    def within(*args: Any) -> Any:
        with context():
            return call(*args)

    return within


def batches(shape: Shape) -> Iterator[torch.Tensor]:
    """Tokens, `[batch, sequence]`, the same on every rank and for every contestant."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(shape.vocabulary, (shape.batch, shape.sequence), generator=generator)


def training_step(system: str, shape: Shape, seat: Seat) -> Callable[[], float]:
    """A step of a contestant: forward, backward, clipping, AdamW; returns the loss."""
    return step_of(SYSTEMS[system](shape, seat), shape)


def step_of(training: Training, shape: Shape) -> Callable[[], float]:
    """A step of a model that stands."""
    tokens = batches(shape)

    def step() -> float:
        batch = next(tokens)
        with training.forward():
            loss = training.model(input_ids=batch, labels=batch).loss
        training.backward(loss)
        training.update()
        return _number(loss)

    return step


def forward_only(system: str, shape: Shape, seat: Seat) -> Callable[[], float]:
    """A forward without gradients; returns the loss."""
    made = EVALUATING[system](shape, seat)
    made.model.eval()
    tokens = batches(shape)

    def forward() -> float:
        batch = next(tokens)
        with torch.no_grad(), made.forward():
            loss = made.model(input_ids=batch, labels=batch).loss
        return _number(loss)

    return forward


def _number(loss: Any) -> float:
    loss = loss.detach()
    return float(loss.full_tensor() if hasattr(loss, "full_tensor") else loss)
