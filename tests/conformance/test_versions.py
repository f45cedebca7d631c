"""Every version of Transformers in the range has the names that plans and patches use."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import transformers

import tensorpar
from tensorpar.registry import plans, require_classes
from tests.conformance.gpt2 import refusal
from tests.families import FAMILIES, PLANS_ONLY

CASES = {case.name: case for case in (*FAMILIES, *PLANS_ONLY)}
#: of each family, a class that the others are built of, and one of its sharded children.
RENAMED = {
    "gpt2": ("GPT2MLP", "c_fc"),
    "bert": ("BertSelfAttention", "key"),
    "roberta": ("RobertaIntermediate", "dense"),
    "gptj": ("GPTJMLP", "fc_in"),
    "gptneo": ("GPTNeoSelfAttention", "out_proj"),
    "gptneox": ("GPTNeoXMLP", "dense_4h_to_h"),
}


def home(family: str) -> Any:
    """The module of Transformers that defines a family."""
    name = CASES[family].model_type
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def built(family: str) -> Any:
    """A model with a language modelling head."""
    return getattr(transformers, CASES[family].model)(CASES[family].config())


def child_renamed(family: str) -> str:
    """What building a model says whose class has given a child another name."""
    name, child = RENAMED[family]
    cls = getattr(home(family), name)
    init = cls.__init__

    def renaming(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._modules["another_name"] = self._modules.pop(child)

    with mock.patch.object(cls, "__init__", renaming), tensorpar.tensor_parallelism():
        return refusal(lambda: built(family), AttributeError)


def class_renamed(family: str) -> str:
    """What building a model says when a class that a plan names is not there."""
    absent = f"{home(family).__name__}.AnotherName"
    tensorpar.register(absent, child=tensorpar.Column())
    try:
        with tensorpar.tensor_parallelism():
            return refusal(lambda: built(family), AttributeError)
    finally:
        tensorpar.unregister(absent)


@pytest.mark.parametrize("family", CASES)
def test_a_renamed_child_is_an_error_at_construction(ranks, family):
    """It names the class, the child and the installed version, on every rank."""
    name, child = RENAMED[family]
    for told in ranks(2).run(child_renamed, family):
        assert "has no child" in told
        assert child in told
        assert f"transformers {transformers.__version__}" in told
        assert name in told or name.startswith("GPTJ")  # GPT-J's block has the plan of both


@pytest.mark.parametrize("family", CASES)
def test_a_renamed_class_is_an_error_at_construction(ranks, family):
    """It would not be found, and stay whole on every rank without a word."""
    for told in ranks(2).run(class_renamed, family):
        assert "has no ['AnotherName']" in told
        assert f"transformers = {transformers.__version__}" in told


def test_every_class_that_a_plan_names_exists():
    """In this version too, and those of families whose models nobody has built here."""
    for family, case in CASES.items():
        assert list(plans(f"{home(family).__name__}."))
        require_classes(getattr(transformers, case.model))
