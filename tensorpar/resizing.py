"""`resize_token_embeddings` of a parallel model: the sharded vocabulary grows or shrinks.

The maths is Transformers' own, on full plain tensors: every rank gathers what is sharded by the
vocabulary, all run the same code under the same random state, and each keeps its part of the
result. It is done rarely and on few tensors, so the memory of one full embedding is the price.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tensorpar.agreement import checksum, require_agreement
from tensorpar.empty_shards import answer_empty_shards
from tensorpar.gathering import whole_parameter
from tensorpar.mesh import tp_mesh
from tensorpar.narrowing import Narrowing
from tensorpar.nn.vocabulary import VocabParallelHead
from tensorpar.parameters import OwnMethods, mix_in
from tensorpar.styles import VocabParallel

#: a module and the name of one of its parameters.
Place = tuple[nn.Module, str]


def bind_resizing(model: nn.Module, root: nn.Module) -> None:
    """Give a parallel Transformers model inside `root` its own `resize_token_embeddings`.

    `root` is remembered because a parameter of an inner model may be tied to one outside it.
    """
    known = _root(model)
    if known is model or any(module is known for module in root.modules()):
        model.__dict__["_tensorpar_root"] = Outside(root)
    mix_in(model, Resizable)


class Outside:
    """What holds a module, which must not hold it in turn; copied and pickled with it.

    Args:
        module: the outer one; None where it is gone, or was not copied with the inner one.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.module = (lambda: None) if module is None else weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Outside:
        return Outside(memo.get(id(self.module())))

    def __reduce__(self) -> tuple[Any, ...]:
        return Outside, (self.module(),)


def _root(model: nn.Module) -> nn.Module:
    outside = model.__dict__.get("_tensorpar_root")
    return model if outside is None else outside.module() or model


class Resizable(OwnMethods):
    """Mixed into the class of a parallel Transformers model."""

    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """`PreTrainedModel.resize_token_embeddings`; collective over the tensor-parallel ranks.

        Values, ties and `config.vocab_size` are those of one process with the same random state;
        the new size need not divide. Embedding, head and its bias get new parameters: build the
        optimizer afterwards.

        Args:
            self: the parallel model.
            new_num_tokens: the new size of the vocabulary; None keeps it.
            pad_to_multiple_of: round the size up to a multiple of this.
            mean_resizing: draw new rows around the mean of the old ones.

        Returns:
            The input embedding, the same module as before.

        Raises:
            ValueError: the ranks' arguments or random states differ; on every rank, and nothing has
                changed.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        mesh = tp_mesh()
        facts = {
            "new_num_tokens": new_num_tokens,
            "pad_to_multiple_of": pad_to_multiple_of,
            "mean_resizing": mean_resizing,
            "torch's random state": f"crc {checksum(torch.get_rng_state()):08x}",
        }
        require_agreement(
            facts,
            mesh,
            "tp ranks would resize the vocabulary differently; pass the same arguments and call "
            "torch.manual_seed alike on all tp ranks",
        )
        with whole_vocabulary(_root(self), mesh):
            return super().resize_token_embeddings(  # type: ignore[misc]
                new_num_tokens, pad_to_multiple_of, mean_resizing
            )


@contextmanager
def whole_vocabulary(root: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
    """Within: all that is sharded by the vocabulary is full and plain, ties kept. Collective.

    Heads may be exchanged for plain linear layers of another size meanwhile; they become parallel.
    """
    places = _places(root)
    heads = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if isinstance(child, VocabParallelHead)
    ]
    _gather(places)
    root.__dict__["_tensorpar_unsettled"] = True
    try:
        yield
    finally:
        narrowing = Narrowing(mesh)
        kept = set(root.modules())
        places = [(module, name) for module, name in places if module in kept]
        for module, name in places:
            narrowing.cut_own(module, name)
        for parent, name, old in heads:
            new = parent._modules[name]
            if new is not None and new is not old and not isinstance(new, VocabParallelHead):
                narrowing.convert(new, VocabParallel(), {"b": 1}, entered=False)
        answer_empty_shards()  # a small vocabulary may leave a rank without a token
        del root.__dict__["_tensorpar_unsettled"]


def _places(root: nn.Module) -> list[Place]:
    """Where parameters are sharded by the vocabulary."""
    return [
        (module, name)
        for module in root.modules()
        for name, layout in module.__dict__.get("layouts", {}).items()
        if layout.cut == "v" and module._parameters.get(name) is not None
    ]


def _gather(places: list[Place]) -> None:
    whole: dict[torch.Tensor, nn.Parameter] = {}
    for module, name in places:
        old = module._parameters[name]
        if not isinstance(old, DTensor):
            continue
        if old not in whole:
            whole[old] = whole_parameter(module, name)
            old._tensorpar_replaced = True
        module._parameters[name] = whole[old]
