"""Multi-head attention with its heads sharded over the tp mesh, for models that are not HF's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar.collectives import copy_region
from tensorpar.mesh import tp_mesh
from tensorpar.parameters import local, local_shard, parameter
from tensorpar.random import Fork
from tensorpar.region import plain
from tensorpar.reproducible import Share, WholeMasks
from tensorpar.rows import enter_region, leave_region


class ParallelAttention(nn.Module):
    """Self- or cross-attention; each rank computes some of the heads.

    A key/value head and the query heads that share it always live on one rank, so grouped-query
    attention (Ainslie et al., "GQA", 2023) needs no communication either. The kernel is
    `scaled_dot_product_attention`.

    Args:
        hidden_size: size of the input's and the output's last dim.
        num_heads: query heads, global.
        num_kv_heads: key/value heads, global; divides `num_heads`, by default equal to it. They
            are what is sharded; ranks beyond them compute nothing.
        head_dim: by default `hidden_size / num_heads`.
        kv_size: last dim of the keys' and values' input; by default `hidden_size`.
        is_causal: each position attends to itself and those before it.
        dropout: probability on the attention weights, while training; masks differ between ranks.
        reproducible_dropout: draw the masks of one process instead, on the CPU; slower, since
            weights are allocated. The option of that name sets it for a whole model.
        bias: whether the four projections have one.
        mesh: the tp mesh; by default that of `tensorpar.init`.

    Raises:
        ValueError: sizes that do not divide as said.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_size: int | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        reproducible_dropout: bool = False,
        bias: bool = True,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads = {num_heads}, required: a multiple of {num_kv_heads = }")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size = {hidden_size}, required: a multiple of {num_heads = }")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.is_causal, self.dropout, self.mesh = is_causal, dropout, mesh or tp_mesh()
        self.reproducible_dropout = reproducible_dropout
        self._fork = Fork()
        group, kv_size = num_heads // num_kv_heads, kv_size or hidden_size
        self._add_linear("q", hidden_size, (num_kv_heads, group, self.head_dim), bias)
        self._add_linear("k", kv_size, (num_kv_heads, self.head_dim), bias)
        self._add_linear("v", kv_size, (num_kv_heads, self.head_dim), bias)
        out = nn.Linear(num_heads * self.head_dim, hidden_size, bias)
        shape = (hidden_size, num_kv_heads, group * self.head_dim)
        self.out_weight = self._cut(out.weight, shape, 1)
        self.out_bias = self._cut(out.bias, (hidden_size,), None) if bias else None

    def _add_linear(self, name: str, in_size: int, out_shape: tuple[int, ...], bias: bool) -> None:
        full = nn.Linear(in_size, torch.Size(out_shape).numel(), bias)
        setattr(self, f"{name}_weight", self._cut(full.weight, (*out_shape, in_size), 0))
        setattr(self, f"{name}_bias", self._cut(full.bias, out_shape, 0) if bias else None)

    def _cut(self, full: torch.Tensor, shape: tuple[int, ...], dim: int | None) -> nn.Parameter:
        shard = local_shard(full.view(shape), self.mesh, dim)
        return parameter(shard, self.mesh, dim, shape)

    def _heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence, in]` to `[batch, this rank's heads, sequence, head_dim]`."""
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        features = F.linear(
            x, local(weight).flatten(0, -2), None if bias is None else local(bias).flatten()
        )
        return rearrange(features, "b s (h d) -> b h s d", d=self.head_dim)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Within: dropout draws from this rank's own stream, or the masks of one process."""
        if self.reproducible_dropout:
            group = self.num_heads // self.num_kv_heads
            held = Share.of(self.num_kv_heads, self.mesh)
            heads = Share(self.num_heads, held.start * group, held.length * group)
            with WholeMasks(type(self).__name__, heads) as masks:
                masks.sharded = True
                yield
            return
        self._fork.enter(self.mesh.get_local_rank())
        try:
            yield
        finally:
            self._fork.leave()

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; one all-reduce forward and one backward for each distinct input.

        Args:
            hidden_states: `[batch, queries, hidden_size]`, the same on all ranks.
            key_value_states: `[batch, keys, kv_size]`, the same on all ranks; by default
                `hidden_states` (self-attention).
            attention_mask: broadcastable to `[batch, 1, queries, keys]`, bool (True: attend) or
                additive float; given a mask, `is_causal` must be part of it.

        Returns:
            `[batch, queries, hidden_size]`, the same on all ranks.
        """
        x = enter_region(hidden_states, self.mesh)
        y = x if key_value_states is None else copy_region(key_value_states, self.mesh)
        query, key, value = self._heads("q", x), self._heads("k", y), self._heads("v", y)
        dropout = self.dropout if self.training else 0.0
        with self._drawing() if dropout else nullcontext():
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attention_mask,
                dropout_p=dropout,
                is_causal=self.is_causal and attention_mask is None,
                enable_gqa=self.num_kv_heads != self.num_heads,
            )
        context = rearrange(context, "b h s d -> b s (h d)")
        output = leave_region(F.linear(context, local(self.out_weight).flatten(1)), self.mesh)
        return output if self.out_bias is None else output + plain(self.out_bias)
