"""What Transformers' tensor parallelism and `parallelize_module` need to be told, per family.

Both shard `nn.Linear` and `nn.Embedding` by name. GPT-2's `Conv1D` is unknown to them, and GPT-2,
GPT-J and GPT-Neo keep head counts and widths in attributes, which have to be divided by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import nn


@dataclass(frozen=True)
class Plan:
    """Names below a model, `*` for a block's number.

    Attributes:
        column: linear layers whose outputs are sharded.
        row: linear layers whose inputs are sharded.
        embedding: the tokens' embedding, sharded along the vocabulary.
        head: the linear layer that computes logits, tied to the embedding.
        head_biases: all names of the head's bias.
        attention: modules with counts of heads, and the attributes to be divided.
    """

    column: tuple[str, ...]
    row: tuple[str, ...]
    embedding: str
    head: str
    head_biases: tuple[str, ...] = ()
    attention: tuple[str, tuple[str, ...]] = ("", ())


def _bert(name: str, head: str, *biases: str) -> Plan:
    layer = f"{name}.encoder.layer.*"
    return Plan(
        column=(
            *(f"{layer}.attention.self.{x}" for x in ("query", "key", "value")),
            f"{layer}.intermediate.dense",
        ),
        row=(f"{layer}.attention.output.dense", f"{layer}.output.dense"),
        embedding=f"{name}.embeddings.word_embeddings",
        head=head,
        head_biases=biases,
    )


_H = "transformer.h.*"
PLANS = {
    "gpt2": Plan(
        column=(f"{_H}.attn.c_attn", f"{_H}.mlp.c_fc"),
        row=(f"{_H}.attn.c_proj", f"{_H}.mlp.c_proj"),
        embedding="transformer.wte",
        head="lm_head",
        attention=(f"{_H}.attn", ("num_heads", "split_size")),
    ),
    "bert": _bert(
        "bert", "cls.predictions.decoder", "cls.predictions.decoder.bias", "cls.predictions.bias"
    ),
    "roberta": _bert("roberta", "lm_head.decoder", "lm_head.decoder.bias", "lm_head.bias"),
    "gptj": Plan(
        column=(*(f"{_H}.attn.{x}_proj" for x in "qkv"), f"{_H}.mlp.fc_in"),
        row=(f"{_H}.attn.out_proj", f"{_H}.mlp.fc_out"),
        embedding="transformer.wte",
        head="lm_head",
        head_biases=("lm_head.bias",),
        attention=(f"{_H}.attn", ("num_attention_heads", "embed_dim")),
    ),
    "gpt_neo": Plan(
        column=(*(f"{_H}.attn.attention.{x}_proj" for x in "qkv"), f"{_H}.mlp.c_fc"),
        row=(f"{_H}.attn.attention.out_proj", f"{_H}.mlp.c_proj"),
        embedding="transformer.wte",
        head="lm_head",
        attention=(f"{_H}.attn.attention", ("num_heads", "embed_dim")),
    ),
}


def matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, Any]]:
    """Modules of which a pattern is the name."""
    parts = pattern.split(".")
    for name, module in model.named_modules():
        own = name.split(".")
        if len(own) == len(parts) and all(p in ("*", o) for p, o in zip(parts, own, strict=True)):
            yield name, module


def made_linear(model: nn.Module, ranks: int) -> None:
    """`Conv1D` replaced by `nn.Linear`; q, k and v in an order whose contiguous parts are heads."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Conv1D":
            continue
        weight, bias = module.weight.detach().T, module.bias.detach()
        if name.endswith("c_attn"):
            by_rank = "(qkv rank n) ... -> (rank qkv n) ..."
            weight = rearrange(weight, by_rank, qkv=3, rank=ranks)
            bias = rearrange(bias, by_rank, qkv=3, rank=ranks)
        linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        linear.weight = nn.Parameter(weight.contiguous())
        linear.bias = nn.Parameter(bias.clone())
        model.set_submodule(name, linear)


def divided(model: nn.Module, plan: Plan, ranks: int) -> None:
    """Counts of heads and widths become a rank's own."""
    pattern, attributes = plan.attention
    for _, module in matching(model, pattern):
        for attribute in attributes:
            whole, rest = divmod(getattr(module, attribute), ranks)
            if rest:
                raise ValueError(f"{attribute} does not divide by {ranks}: the peers cannot do it")
            setattr(module, attribute, whole)


def tied(model: nn.Module, plan: Plan) -> None:
    """The ties that sharding has cut."""
    config: Any = model.config
    if config.tie_word_embeddings:
        head = model.get_submodule(plan.head)
        head.weight = model.get_submodule(plan.embedding).weight
    places = [name.rpartition(".") for name in plan.head_biases]
    biases = [getattr(model.get_submodule(owner), name) for owner, _, name in places]
    for owner, _, name in places:
        sharded = next(bias for bias in biases if hasattr(bias, "device_mesh"))
        setattr(model.get_submodule(owner), name, sharded)


@torch.no_grad()
def clip_(parameters: list[nn.Parameter], max_norm: float) -> None:
    """Gradients scaled by their common norm: torch's own refuses DTensors beside plain tensors."""
    plain = [x.grad for x in parameters if x.grad is not None and not hasattr(x, "device_mesh")]
    sharded = [x.grad for x in parameters if x.grad is not None and hasattr(x, "device_mesh")]
    norms = [torch.nn.utils.get_total_norm(group) for group in (plain, sharded) if group]
    full = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in norms]
    norm = torch.linalg.vector_norm(torch.stack(full))
    for group in (plain, sharded):
        torch.nn.utils.clip_grads_with_norm_([_Gradient(x) for x in group], max_norm, norm)


class _Gradient:
    """What torch's function wants to see of a parameter."""

    def __init__(self, grad: Any) -> None:
        self.grad = grad
