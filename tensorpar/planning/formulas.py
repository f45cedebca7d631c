"""Closed formulas of a step of GPT-2 and GPT-J, which a plan must equal; for the largest rank.

A plan is derived by running the model's own code on tensors without storage; these say the same by
hand, so that a reader can check one against the other. With

    t   tensor-parallel degree          c(x) = ceil(x / t), the first rank's share of x
    L   layers      h  width            A = c(heads) * head_dim, attention features of this rank
    V   vocabulary  P  positions        I = c(inner), MLP features of this rank
    b   rows        s  tokens a row     N = b * s tokens     e  bytes of an element
    n   tokens of the residual stream on this rank: N, or b c(s) where the sequence is split

| term | GPT-2 | GPT-J |
|---|---|---|
| parameters of a layer's attention | `4hA + 3A + h` | `4hA`, without biases |
| parameters of a layer's MLP | `2hI + I + h` | the same |
| parameters of a layer's norms | `4h` | `2h` |
| beyond layers | `c(V) h + P h + 2h` (head tied) | `2 c(V) h + c(V) + 2h` |
| gradients | as parameters | |
| moments of AdamW | twice the parameters and 4 bytes per tensor (its step) | |
| FLOP forward, per layer | `2N (4hA + 2hI)` products, `4 N s A` scores and their use | |
| FLOP forward, head | `2N h c(V)` | |
| FLOP backward | twice the products; `10 N s A` attention, which recomputes its scores | |
| all-reduce forward | `2L + 1` of `N h e` bytes | `L + 1` |
| all-reduce backward | `2L + 1` of `N h e` bytes | `L + 1` |
| all-reduce loss | `4N + 2 * 4N` bytes in two calls | |
| all-reduce batch check | 16 bytes in one call | |
| sequence parallel: all-gather, forward and backward each | `2L + 1` of `t n h e` | `L + 1` |
| sequence parallel: reduce-scatter, forward and backward each | `2L` of `t n h e` | `L` |
| sequence parallel: all-reduce forward | 1 of `N h e` | the same |
| sequence parallel: all-reduce backward | `L + 2` of `(N + 6L + 2) h e` in all | `3L` for `6L` |
| replicate, all-reduce data parallel | the gradients, once | |

The counts of parameters and products are those of Narayanan et al., "Efficient large-scale
language model training on GPU clusters using Megatron-LM" (2021, arXiv:2104.04473, appendix), with
the shards of Shoeybi et al., "Megatron-LM" (2019, arXiv:1909.08053, section 3) and uneven shares.

Activations, as Korthikanti et al., "Reducing activation recomputation in large transformer models"
(2022, arXiv:2205.05198, section 4.1) count them: what is replicated is whole, what is sharded is
divided by t. The coefficients are this model's, without dropout and with fused attention, which
keeps q, k, v, its output and one number a query and head in place of their `5 b a s^2`:

| per layer | elements |
|---|---|
| input and output of each norm (GPT-2 two norms, GPT-J one) | `(n + N) h` per norm |
| mean and deviation of each norm | `2 n` per norm, float32 |
| attention: q, k, v and the output | `4 N A`; GPT-2 `6 N A` |
| attention: log-sum-exp | `N c(heads)`, float32 |
| MLP: input of the GELU, its three intermediate results, its output | `5 N I` |
| GPT-J: sines and cosines of q and k | `4 s rotary_dim` |

GPT-2 keeps 2 more: with `use_cache` on, Transformers' default, k and v are copied into a cache, and
the fused product that q is a view of is kept whole.

| once | elements |
|---|---|
| input, output, mean and deviation of the last norm | `(n + N) h`, and `2 n` float32 |
| logits of this rank | `N c(V)` |
| loss | three float32, one int64, two bool a token, and 8 bytes |
| embedding | `N` int64 and `N` bool, which rows are another rank's |
| GPT-2: position ids | `s` int64 |
| GPT-J: the causal mask | `b s s` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tensorpar.planning.counting import Sent
from tensorpar.planning.wanted import Wanted

_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class Sizes:
    """The symbols of this module's page, for one wanted step."""

    t: int
    L: int
    h: int
    heads: int
    A: int
    inner: int
    V: int
    P: int
    b: int
    s: int
    n: int
    e: int
    rotary: int
    is_gptj: bool

    @classmethod
    def of(cls, wanted: Wanted) -> Sizes:
        """From the config.

        Raises:
            ValueError: a family without formulas here, or a head that is not for language
                modelling.
        """
        config, t = wanted.config, wanted.tp
        if wanted.head not in ("GPT2LMHeadModel", "GPTJForCausalLM"):
            raise ValueError(
                f"model class = {wanted.head!r}, required: GPT2LMHeadModel or GPTJForCausalLM"
            )

        def share(size: int) -> int:
            return -(-size // t)

        return cls(
            t=t,
            L=config.n_layer,
            h=config.n_embd,
            heads=share(config.n_head),
            A=share(config.n_head) * (config.n_embd // config.n_head),
            inner=share(config.n_inner or 4 * config.n_embd),
            V=share(config.vocab_size),
            P=config.n_positions,
            b=wanted.batch,
            s=wanted.sequence,
            n=wanted.batch
            * (share(wanted.sequence) if wanted.sequence_parallel else wanted.sequence),
            e=wanted.dtype.itemsize,
            rotary=getattr(config, "rotary_dim", 0),
            is_gptj=wanted.head.startswith("GPTJ"),
        )

    @property
    def N(self) -> int:  # noqa: N802
        """Tokens."""
        return self.b * self.s


def num_parameters(z: Sizes) -> int:
    """Elements that the largest rank holds."""
    mlp = 2 * z.h * z.inner + z.inner + z.h
    if z.is_gptj:
        return z.L * (4 * z.h * z.A + mlp + 2 * z.h) + 2 * z.V * z.h + z.V + 2 * z.h
    attention = 4 * z.h * z.A + 3 * z.A + z.h
    return z.L * (attention + mlp + 4 * z.h) + z.V * z.h + z.P * z.h + 2 * z.h


def num_tensors(z: Sizes) -> int:
    """Parameters as tensors: GPT-J 10 a layer and 5 beyond, GPT-2 12 and 4."""
    return z.L * 10 + 5 if z.is_gptj else z.L * 12 + 4


def adamw_bytes(z: Sizes) -> int:
    """Both moments and the step of every tensor."""
    return 2 * num_parameters(z) * z.e + num_tensors(z) * _FLOAT32


def flop(z: Sizes) -> int:
    """Of a step, without recomputation."""
    products = 2 * z.N * (z.L * (4 * z.h * z.A + 2 * z.h * z.inner) + z.h * z.V)
    return 3 * products + z.L * (4 + 10) * z.N * z.s * z.A


def sent(z: Sizes) -> Mapping[str, Sent]:
    """Collectives of tensor parallelism, by kind."""
    if z.t == 1:
        return {}
    regions = (1 if z.is_gptj else 2) * z.L
    activations = Sent(regions + 1, (regions + 1) * z.N * z.h * z.e)
    found = {
        "all-reduce backward": activations,
        "all-reduce batch check": Sent(1, 2 * _INT64),
        "all-reduce forward": activations,
        "all-reduce loss": Sent(2, 3 * z.N * _FLOAT32),
    }
    if z.n == z.N:
        return found
    found["all-reduce forward"] = Sent(1, z.N * z.h * z.e)
    # of the head's input; and gradients of norms and biases, to which each rank adds its rows'
    common = (3 if z.is_gptj else 6) * z.L + 2
    found["all-reduce backward"] = Sent(z.L + 2, (z.N + common) * z.h * z.e)
    chunks = z.t * z.n * z.h * z.e
    for phase in ("forward", "backward"):
        found[f"all-gather {phase}"] = Sent(regions + 1, (regions + 1) * chunks)
        found[f"reduce-scatter {phase}"] = Sent(regions, regions * chunks)
    return found


def activations(z: Sizes) -> int:
    """Bytes kept for backward, in float32, without dropout or recomputation."""
    norms = 1 if z.is_gptj else 2
    norm = (z.n + z.N) * z.h * z.e + 2 * z.n * _FLOAT32
    layer = norms * norm
    layer += (4 if z.is_gptj else 6) * z.N * z.A * z.e + z.N * z.heads * _FLOAT32
    layer += 5 * z.N * z.inner * z.e
    loss = z.N * z.V * z.e + z.N * (3 * _FLOAT32 + _INT64 + 2) + _INT64
    embedding = z.N * (_INT64 + 1)
    if z.is_gptj:
        layer += 4 * z.s * z.rotary * z.e
        return z.L * layer + norm + loss + embedding + z.b * z.s * z.s * z.e
    return z.L * layer + norm + loss + embedding + z.s * _INT64
