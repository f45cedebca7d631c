"""The sharded vocabulary: word embedding and language-model head, each rank some of the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import copy_region, gather_region, reduce_region_
from tensorpar.guard import note_activation
from tensorpar.mesh import tp_mesh
from tensorpar.nn.cross_entropy import loss_on_shards
from tensorpar.nn.greedy import ShardedLogits, chooses_greedily
from tensorpar.nn.tied import embedded, scoring
from tensorpar.parameters import from_local, local, mixture, shard_in_place
from tensorpar.partition import chunk_bounds


class VocabParallel:
    """Forward of an embedding that holds some of the tokens.

    Attributes:
        mesh: the tp mesh.
        weight: `[num_embeddings, embedding_dim]`, DTensor sharded on dim 0.
    """

    mesh: DeviceMesh
    weight: torch.Tensor
    num_embeddings: int
    padding_idx: int | None

    def _bounds(self) -> tuple[int, int]:
        """The tokens whose rows this rank holds, as a half-open range."""
        return chunk_bounds(self.num_embeddings, self.mesh.size(), self.mesh.get_local_rank())

    def local_padding_idx(self) -> int | None:
        """`padding_idx` as an index of this rank's rows; None where another rank holds it."""
        start, stop = self._bounds()
        if self.padding_idx is None or not start <= self.padding_idx < stop:
            return None
        return self.padding_idx - start

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """int64 `[...]`, the same on all ranks, to `[..., embedding_dim]`; one all-reduce.

        Raises:
            IndexError: a token is outside `range(num_embeddings)`. Every rank sees all tokens, so
                every rank raises.
        """
        if input.device.type == "cpu" and input.numel():
            low, high = (int(bound) for bound in input.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(
                    f"tokens in [{low}, {high}], required: in [0, {self.num_embeddings})"
                )
        start, stop = self._bounds()
        foreign = (input < start) | (input >= stop)
        local_ids = (input - start).masked_fill(foreign, 0)
        if start < stop:
            rows = embedded(self.weight, local_ids, self.local_padding_idx())
        else:  # no token lives here, and F.embedding needs one row
            weight = local(self.weight)
            row = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
            rows = F.embedding(local_ids, row)
        return reduce_region_(rows.masked_fill(foreign.unsqueeze(-1), 0.0), self.mesh)


@mixture
class VocabParallelEmbedding(VocabParallel, nn.Embedding):
    """`torch.nn.Embedding` with its rows sharded over the tp mesh.

    The constructor draws the full weight as `torch.nn.Embedding` does and keeps this rank's rows.

    Args:
        num_embeddings: global number of tokens; need not divide.
        embedding_dim: size of one row.
        padding_idx: a token (not negative) whose row starts at zero and gets no gradient.
        mesh: the tp mesh; by default that of `tensorpar.init`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        mesh: DeviceMesh | None = None,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx)
        self.mesh = mesh or tp_mesh()
        shard_in_place(self, {"weight": 0}, self.mesh)


class VocabParallelHead:
    """Forward of a language-model head that holds some of the vocabulary.

    Mixed into a linear layer `[hidden -> vocabulary]`, usually tied to the embedding.

    Attributes:
        mesh: the tp mesh.
        weight: `[vocabulary, hidden]`, DTensor sharded on dim 0.
        bias: `[vocabulary]`, sharded alike, or None.
    """

    mesh: DeviceMesh
    weight: torch.Tensor
    bias: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., hidden]`, the same on all ranks, to logits `[..., vocabulary]`.

        While the enclosing model computes a loss the logits are a DTensor `Shard(-1)`, while
        `generate` takes the likeliest token they are `ShardedLogits`, and nothing is gathered;
        otherwise they are whole and plain on every rank.
        """
        note_activation(self, "input", input)
        bias = None if self.bias is None else local(self.bias)
        # of an input with gaps (the last position's), torch makes a product for each row of the
        # batch, unless the weight requires a gradient, which a local one does not in generation
        dense = copy_region(input, self.mesh).contiguous()
        logits = F.linear(dense, scoring(self.weight), bias)
        shape = (*logits.shape[:-1], self.weight.shape[0])
        if loss_on_shards():
            return from_local(logits, self.mesh, len(shape) - 1, shape)
        if chooses_greedily():
            return ShardedLogits.of(logits, shape[-1], self.mesh)
        return gather_region(logits, len(shape) - 1, shape[-1], self.mesh)


@mixture
class VocabParallelLinear(VocabParallelHead, nn.Linear):
    """`torch.nn.Linear` as a language-model head with its rows sharded over the tp mesh."""
