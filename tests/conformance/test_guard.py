"""The guard: replicas that have drifted apart are an error on all ranks that names the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from tensorpar.guard import DivergenceError, fingerprint
from tensorpar.parameters import local, shard_dim
from tests.collectives import Collectives
from tests.conformance.families import CASES, build, inputs

DECODERS = {"gpt2", "gptj", "gptneo", "gptneox"}


def guarded(family: str, every: int = 1) -> Any:
    """A model in training, dropout on, whose every forward is checked."""
    options = {"check_replicas_every": every, "check_batches": False}
    model = build(family, CASES[family].model, parallel=True, **options).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


def layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The path and the list of a model's layers."""
    return next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))


def trained(model: Any, family: str) -> str:
    """The error of a training step, or how it went."""
    try:
        model(**inputs(CASES[family].model, labels=True)).loss.backward()
    except DivergenceError as error:
        return str(error)
    return "no error"


def perturbed_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Forward hook: the output, a little off in one place, on the last rank."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return output
    first = output if isinstance(output, torch.Tensor) else output[0]
    noise = torch.zeros_like(first)
    noise.view(-1)[3] = 1e-3
    return first + noise if first is output else (first + noise, *output[1:])


def with_a_parameter_nudged(family: str) -> tuple[str, str]:
    """The last rank's last norm weight of layer 1 moved by one unit in the last place."""
    model = guarded(family)
    path, _ = layers(model)
    norms = [
        (name, p)
        for name, p in model.named_parameters()
        if name.startswith(f"{path}.1.") and shard_dim(p) is None and "weight" in name
    ]
    name, parameter = norms[-1]
    if dist.get_rank() == dist.get_world_size() - 1:
        values = local(parameter.detach())
        values[5] = torch.nextafter(values[5], values[5] + 1)
    return trained(model, family), f"the parameter {name} "


def with_the_generator_advanced(family: str) -> tuple[str, str]:
    """One number drawn on the last rank only."""
    model = guarded(family)
    if dist.get_rank() == dist.get_world_size() - 1:
        torch.rand(1)
    return trained(model, family), "the random state of torch at the entrance"


def with_an_activation_perturbed(family: str) -> tuple[str, str]:
    """Layer 0's output a little off: first seen at the first door in layer 1."""
    model = guarded(family)
    path, blocks = layers(model)
    blocks[0].register_forward_hook(perturbed_output)
    return trained(model, family), f"the activation hidden_states entering {path}.1"


class OtherToken(LogitsProcessor):
    """On the last rank, prefers another token from some length on."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == dist.get_world_size() - 1 and ids.shape[1] >= 12:
            return scores.roll(1, -1)
        return scores


def generated(family: str, every: int) -> str:
    """The error of a generation during which one rank's tokens are changed."""
    model = guarded(family, every).eval()
    given = inputs(CASES[family].model, labels=False)
    flipped = {name: value.flip(-1) for name, value in given.items()}
    changed = LogitsProcessorList([OtherToken()])
    clean = model.generate(**flipped, max_new_tokens=6, pad_token_id=1)
    try:
        model.generate(**flipped, max_new_tokens=6, pad_token_id=1, logits_processor=changed)
    except DivergenceError as error:
        return f"{tuple(clean.shape)} {error}"
    return "no error"


FAULTS: list[Callable[[str], tuple[str, str]]] = [
    with_a_parameter_nudged,
    with_the_generator_advanced,
    with_an_activation_perturbed,
]


def all_faults(family: str) -> list[tuple[str, str]]:
    """Each fault's error and its expected beginning; then a step without any."""
    told = [(trained(guarded(family), family), "no error")]
    for fault in FAULTS:
        torch.manual_seed(0)
        told.append(fault(family))
    if family in DECODERS:
        torch.manual_seed(0)
        told += [(generated(family, every), "the tokens that") for every in (1, 3)]
    torch.manual_seed(0)
    return [*told, (trained(guarded(family), family), "no error")]


@pytest.mark.feature("divergence guard")
@pytest.mark.parametrize("family", sorted(CASES))
def test_the_first_thing_that_differs_is_named(ranks, family):
    """Clean steps pass; each fault raises on both ranks and names what differs, and where."""
    for told in ranks(2).run(all_faults, family):
        for found, expected in told:
            assert expected in found
            if expected != "no error":
                assert "not the same on tp ranks [1] as on rank 0" in found


def in_the_middle_of_a_layer() -> tuple[str, str]:
    """The norm before the MLP of layer 1 is off: its attention is not blamed."""
    model = guarded("gpt2")
    model.transformer.h[1].ln_2.register_forward_hook(perturbed_output)
    first = trained(model, "gpt2")
    model = guarded("gpt2")
    model.transformer.ln_f.register_forward_hook(perturbed_output)
    return first, trained(model, "gpt2")


def test_the_next_module_is_named(ranks):
    """What differs is blamed on what lies between two doors, the head's among them."""
    for first, last in ranks(2).run(in_the_middle_of_a_layer):
        assert "the activation hidden_states entering transformer.h.1.mlp " in first
        assert "the activation input entering lm_head " in last


def counted(every: int | None, family: str = "gpt2") -> list[int]:
    """Collectives of each of four training forwards."""
    options = {} if every is None else {"check_replicas_every": every}
    model = build(family, CASES[family].model, parallel=True, **options).train()
    counts = []
    for _ in range(4):
        with Collectives() as seen:
            loss = model(**inputs(CASES[family].model, labels=True)).loss
        loss.backward()
        counts.append(seen.counts.total())
    return counts


def test_a_check_is_one_small_collective(ranks):
    """One a check, on the first forward and every N after it; none at all when it is off."""
    plain, off, every, second = (ranks(2).run(counted, n)[0] for n in (None, 0, 1, 2))
    assert plain == off
    assert [n - m for n, m in zip(every, off, strict=True)] == [1, 1, 1, 1]
    assert [n - m for n, m in zip(second, off, strict=True)] == [1, 0, 1, 0]


def on_data_parallel_ranks() -> str:
    """Data-parallel ranks with other batches and other random streams."""
    model = guarded("gpt2")
    given = inputs("LM", labels=True)
    given = {name: value.roll(dist.get_rank() // 2, 0) for name, value in given.items()}
    torch.manual_seed(dist.get_rank() // 2)
    try:
        model(**given).loss.backward()
    except DivergenceError as error:
        return str(error)
    return "no error"


def test_data_parallel_ranks_may_differ(ranks):
    """Only tensor-parallel ranks are compared."""
    world = ranks(4, tensor_parallel_degree=2)
    assert world.run(on_data_parallel_ranks) == ["no error"] * 4


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_fingerprints_see_every_element(dtype):
    """One element changed, or two exchanged, is another number; a copy is the same."""
    values = torch.arange(24).remainder(2).view(4, 6).to(dtype)
    assert torch.equal(fingerprint(values), fingerprint(values.clone()))
    assert torch.equal(fingerprint(values.t()), fingerprint(values.t().contiguous()))
    for place in range(values.numel()):
        changed = values.clone()
        changed.view(-1)[place] = 1 - changed.view(-1)[place].to(torch.int64)
        assert not torch.equal(fingerprint(values), fingerprint(changed))
    assert not torch.equal(fingerprint(values), fingerprint(values.roll(1)))
