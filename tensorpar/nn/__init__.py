"""Parallel layers, usable on their own: linear, embedding, attention and the sharded loss."""

from tensorpar.nn.attention import ParallelAttention
from tensorpar.nn.cross_entropy import vocab_parallel_cross_entropy
from tensorpar.nn.linear import ColumnParallelLinear, RowParallelLinear
from tensorpar.nn.vocabulary import VocabParallelEmbedding

__all__ = [
    "ColumnParallelLinear",
    "ParallelAttention",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "vocab_parallel_cross_entropy",
]
