"""GPT-2 models that shard badly on purpose, and what is compared of them.

The same functions run in one process on Transformers' own model and on every rank on the parallel
one, so a test says what the user's script says. Five heads, a vocabulary of 97 and an inner size of
83 divide by no world size; at four ranks the last one has no head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

import tensorpar
from tensorpar.gathering import hf_layout, whole_tensors
from tensorpar.nn.linear import ColumnParallel

Tensors = dict[str, torch.Tensor]

SIZES = {
    "vocab_size": 97,
    "n_embd": 40,
    "n_head": 5,
    "n_inner": 83,
    "n_layer": 2,
    "n_positions": 32,
    "pad_token_id": 96,
    "bos_token_id": 95,
    "eos_token_id": 95,
}
NO_DROPOUT = dict.fromkeys(
    ("attn_pdrop", "resid_pdrop", "embd_pdrop", "summary_first_dropout", "classifier_dropout"), 0.0
)
DROPOUT = dict.fromkeys(NO_DROPOUT, 0.3)


@dataclass(frozen=True)
class Case:
    """A model, and how its forward is called.

    Attributes:
        head: the name of a Transformers class.
        config: beyond `SIZES` and no dropout.
        inputs: forward arguments beyond those that `batch` makes for the class.
        labels: whether the arguments from which the model computes its loss are passed.
        checkpointing: whether activations are recomputed in backward.
        dtype: of the model.
    """

    head: str = "GPT2LMHeadModel"
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    labels: bool = True
    checkpointing: bool = False
    dtype: torch.dtype = torch.float64

    def but(self, **changes: Any) -> Case:
        """The same case with some fields changed."""
        return replace(self, **changes)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within: `dtype` is torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def config(case: Case) -> Any:
    """The case's Transformers config."""
    return transformers.GPT2Config(**{**SIZES, **NO_DROPOUT, **case.config})


def build(case: Case, *, parallel: bool, seed: int = 0) -> Any:
    """The model with the values that Transformers' initialiser gives it."""
    torch.manual_seed(seed)
    with default_dtype(case.dtype), tensorpar.tensor_parallelism() if parallel else nullcontext():
        model = getattr(transformers, case.head)(config(case))
    if case.checkpointing:
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: Any, *arguments: Any) -> None:
    """Switch activation checkpointing on, under the name that this version has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(*arguments)


def perturbed(case: Case, *, parallel: bool) -> Any:
    """The model with every parameter moved from its initial value, zeros and ones included."""
    reference = build(case, parallel=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=case.dtype)
            parameter.add_(noise, alpha=0.1)
    if not parallel:
        return reference
    model = build(case, parallel=True)
    tensorpar.DistributedModel(model).load_state_dict(reference.state_dict())
    return model


def batch(case: Case) -> dict[str, Any]:
    """The case's forward arguments; the same in every process."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int, below: int = 95) -> torch.Tensor:
        return torch.randint(below, shape, generator=generator)

    ids = draw(3, 2, 7) if "Double" in case.head else draw(3, 11)
    num_labels = case.config.get("num_labels", 2)
    loss_arguments = {
        "GPT2Model": {},
        "GPT2LMHeadModel": {"labels": ids.clone()},
        "GPT2DoubleHeadsModel": {"labels": ids.clone(), "mc_labels": draw(3, below=2)},
        "GPT2ForSequenceClassification": {"labels": draw(3, below=num_labels)},
        "GPT2ForTokenClassification": {"labels": draw(3, 11, below=num_labels)},
        "GPT2ForQuestionAnswering": {
            "start_positions": draw(3, below=11),
            "end_positions": draw(3, below=11),
        },
    }
    given = {"input_ids": ids, **(loss_arguments[case.head] if case.labels else {})}
    if "Double" in case.head:
        given["mc_token_ids"] = torch.tensor([[6, 5], [6, 6], [3, 6]])
    extra = {name: x.clone() if torch.is_tensor(x) else x for name, x in case.inputs.items()}
    return {**given, **extra}


def loss_of(case: Case, output: Any) -> torch.Tensor:
    """The model's loss; without labels one that this test computes in float64."""
    if case.labels and case.head != "GPT2Model":
        if isinstance(output, tuple):
            return output[0]
        return sum(output[name] for name in ("loss", "mc_loss") if name in output)
    values = list(tensors_of(output).values())
    if case.head == "GPT2LMHeadModel":
        kept = output.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(kept, torch.arange(kept.shape[0]) % 97)
    return sum(
        (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum() for value in values
    )


def tensors_of(output: Any, prefix: str = "") -> Tensors:
    """Every floating tensor of an output by name, whole; caches, which are each rank's own, not."""
    pairs = output.items() if isinstance(output, Mapping) else enumerate(output)
    found: Tensors = {}
    for name, value in pairs:
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value.full_tensor() if isinstance(value, DTensor) else value
        elif isinstance(value, tuple | list):
            found.update(tensors_of(value, f"{prefix}{name}."))
    return found


def hf_tensors(model: nn.Module, tensors: Mapping[str, Any]) -> Tensors:
    """Parameters or gradients, whole and in Hugging Face's layout."""
    return hf_layout(model, dict(whole_tensors(tensors)))


def weights_of(model: nn.Module) -> Tensors:
    """All parameters in Hugging Face's layout."""
    return hf_tensors(model, dict(model.named_parameters()))


def gradients_of(model: nn.Module) -> Tensors:
    """All gradients in Hugging Face's layout."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return hf_tensors(model, found)


def detached(tensors: Tensors, prefix: str) -> Tensors:
    """Copies that can travel, under a prefix."""
    return {f"{prefix}/{name}": value.detach().clone() for name, value in tensors.items()}


def is_parallel(model: nn.Module) -> bool:
    """Whether every parameter is a DTensor, and a class with a plan has parallel layers."""
    kinds = {isinstance(p, DTensor) for p in model.parameters()}
    columns = {isinstance(m, ColumnParallel) for m in model.modules() if isinstance(m, Conv1D)}
    assert len(kinds) == 1
    assert columns in ({False}, {True, False})
    assert kinds == {True in columns}
    return kinds.pop()


def outputs(model: Any, case: Case) -> Tensors:
    """What the model computes in eval mode."""
    with torch.no_grad():
        return detached(tensors_of(model.eval()(**batch(case))), "eval")


def refusal(call: Callable[[], Any], error: type[Exception] = ValueError) -> str:
    """The message with which a call is refused."""
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def require_equal_ranks(results: list[Tensors]) -> None:
    """All ranks hold the same tensors, bit for bit."""
    for rank, other in enumerate(results):
        assert other.keys() == results[0].keys()
        unequal = [name for name in other if not torch.equal(other[name], results[0][name])]
        assert not unequal, f"rank {rank} differs from rank 0 in {unequal}"


def scale_of(tensors: Tensors) -> float:
    """The largest value, to which rounding is relative; at least 1."""
    return max(1.0, *(x.abs().max().item() for x in tensors.values()))


def require_close(ours: Tensors, reference: Tensors, tolerance: float) -> None:
    """The same names and shapes, and values within an absolute tolerance."""
    assert ours.keys() == reference.keys()
    shapes = {name: (tuple(x.shape), tuple(reference[name].shape)) for name, x in ours.items()}
    assert not {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    far = {
        name: difference
        for name, x in ours.items()
        if x.numel() and not (difference := (x - reference[name]).abs().max().item()) <= tolerance
    }
    assert not far, f"beyond {tolerance}: {far}"
