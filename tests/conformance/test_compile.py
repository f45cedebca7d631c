"""`torch.compile` accepts a parallel model and leaves it as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tensorpar
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    EXACT,
    IN_FLOAT32,
    build,
    compared,
    inputs,
)
from tests.conformance.gpt2 import Tensors, require_close, require_equal_ranks, scale_of


def seen(family: str, model: Any) -> Tensors:
    given = inputs(CASES[family].model, labels=False)
    return compared(model, {**given, "output_hidden_states": True}, given["attention_mask"])


class Compiled:
    """A model and `torch.compile` around it, in its place where it is called."""

    def __init__(self, model: Any, run: Any) -> None:
        self.model, self.run = model, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **given: Any) -> Any:
        """Two lengths: the second is where a graph would be made anew."""
        self.run(**{name: x[:, :-1] if torch.is_tensor(x) else x for name, x in given.items()})
        return self.run(**given)


def compiled(family: str, way: str) -> tuple[Tensors, int]:
    """What a compiled parallel model computes, and how many graphs were made of it."""
    model = build(family, CASES[family].model, parallel=True)
    num_graphs = 0

    def backend(graph: Any, _: object) -> Any:
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    if way == "in place":
        model.compile(backend=backend)
        run = model
    elif way == "around":
        run = torch.compile(tensorpar.DistributedModel(model), backend=backend)
    else:
        run = torch.compile(model, backend=backend)
    return seen(family, Compiled(model, run)), num_graphs


def one_process(family: str) -> Tensors:
    model = build(family, CASES[family].model, parallel=False)
    return seen(family, model)


CALLED = [(family, "called") for family in sorted(CASES)]


@pytest.mark.feature("torch.compile is accepted, and runs the model as it is")
@pytest.mark.parametrize(("family", "way"), [*CALLED, ("gpt2", "in place"), ("gpt2", "around")])
def test_a_compiled_model_computes_what_one_process_does(ranks, family, way):
    """No graph is made, of which ranks could leave at different places."""
    results = ranks(2).run(compiled, family, way)
    require_equal_ranks([found for found, _ in results])
    reference = one_process(family)
    tolerance = BEHIND_FLOAT32 * scale_of(reference) if family in IN_FLOAT32 else EXACT
    require_close(results[0][0], reference, tolerance)
    assert [num_graphs for _, num_graphs in results] == [0, 0]
