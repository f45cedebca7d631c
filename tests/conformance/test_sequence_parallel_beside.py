"""Sequence parallelism beside adapters, data parallelism and plans of the user's own."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import tensorpar
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    build,
    inputs,
    probe,
)
from tests.conformance.gpt2 import (
    Tensors,
    detached,
    gradients_of,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)
from tests.conformance.test_life_cycle_lora import lora, perturb_adapters
from tests.conformance.test_sequence_parallel import SPLIT


def with_adapters(parallel: bool) -> Tensors:
    """A step of LoRA on every linear layer."""
    found: Tensors = {}
    for family in ("gpt2", "gptj"):
        options = SPLIT if parallel else {}
        model = build(family, CASES[family].model, parallel=parallel, **options)
        torch.manual_seed(5)
        model = peft.get_peft_model(model, lora(family)).train()
        perturb_adapters(model)
        output = model(**inputs("", labels=False))
        probe(output, inputs("", labels=False)["attention_mask"]).backward()
        found |= detached(gradients_of(model), family)
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_adapters(ranks):
    """The pairs of LoRA take and return rows where their layers do."""
    results = ranks(4).run(with_adapters, True)
    require_equal_ranks(results)
    require_close(results[0], with_adapters(False), EXACT)


def beside_data(kind: str | None) -> Tensors:
    """Loss and weights of a step on a batch of four, a part of it on each data-parallel rank."""
    options = {} if kind is None else SPLIT
    model = build("gpt2", "GPT2LMHeadModel", parallel=kind is not None, **options)
    model.train()
    given = {name: x.repeat(2, 1)[:4] for name, x in inputs("", labels=False).items()}
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    if kind is not None:
        model = tensorpar.DistributedModel(model, data_parallel=kind)
        own = slice(2 * tensorpar.dp_rank(), 2 * tensorpar.dp_rank() + 2)
        if kind == "fsdp":
            model.module.gradient_checkpointing_enable()
        given = {name: x[own] for name, x in given.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**given, labels=given["input_ids"]).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return weights_of(getattr(model, "module", model))


@pytest.mark.feature("sequence parallelism beside data parallelism")
@pytest.mark.parametrize("family", ["gpt2"])
def test_beside_data_parallelism(ranks, family):
    """2 x 2 ranks, of which two split a sequence, train as one process."""
    reference = beside_data(None)
    for kind in ("fsdp", "replicate"):
        results = ranks(4, tensor_parallel_degree=2).run(beside_data, kind)
        require_equal_ranks(results)
        require_close(results[0], reference, BEHIND_FLOAT32)
    del family


class Block(nn.Module):
    """A block of the user's own, whose column layer enters its region by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 11), nn.Linear(11, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())


class Stack(nn.Module):
    """A model of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def own_model(parallel: bool) -> Tensors:
    """Output and gradients of it, and where it is parallel, how it is refused before."""
    model = Stack()
    if parallel:
        options = tensorpar.options.Options(sequence_parallel=True)
        tensorpar.register(Block, up=tensorpar.Column(), down=tensorpar.Row())
        told = refusal(lambda: tensorpar.parallelize(model, options=options))
        assert "required: a class registered with stream=Stream(blocks, norm)" in told
        tensorpar.register(Stack, stream=tensorpar.Stream("blocks"))
        tensorpar.parallelize(model, options=options)
        told = refusal(lambda: model.blocks[0](torch.ones(1, 5, 6).double()), RuntimeError)
        assert "outside its model's forward" in told
        tensorpar.unregister(Block)
        tensorpar.unregister(Stack)
    output = model(torch.arange(90).double().view(3, 5, 6).sin())
    (output * torch.linspace(-1, 1, 90).double().view(3, 5, 6)).sum().backward()
    return {"output": output.detach()} | detached(gradients_of(model), "gradient")


def test_a_model_of_the_users_own(ranks):
    """A registered class says where its stream is; without one the option is refused."""
    results = ranks(4).run(own_model, True)
    require_equal_ranks(results)
    require_close(results[0], own_model(False), EXACT)
