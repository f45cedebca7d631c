"""The registry of plans."""

import pytest
from torch import nn

import tensorpar as tp
from tensorpar.registry import Replacement, constructor_arguments, find, plans
from tensorpar.styles import Column, OwnParameter, Row, VocabParallel


class Attention(nn.Module):
    pass


class Special(Attention):
    pass


@pytest.fixture
def registered():
    """Forgets what a test registers."""
    classes = []
    yield classes
    for module in classes:
        tp.unregister(module)


def test_a_subclass_is_served_by_its_parents_plan(registered):
    """Plans are found along the method resolution order."""
    tp.register(Attention, out=Row())
    registered.append(Attention)
    assert find(Special) is find(Attention)
    assert find(nn.Module) is None


def test_a_class_is_registered_once(registered):
    """Twice, by class or by name, is refused."""
    tp.register(Attention, out=Row())
    registered.append(Attention)
    for again in (Attention, f"{__name__}.Attention"):
        with pytest.raises(ValueError, match="registered already"):
            tp.register(again, out=Row())
    with pytest.raises(ValueError, match="registered already"):
        tp.tp_register(nn.Linear)(Attention)


def test_a_plan_needs_children_with_styles():
    """No child, or a child that is no style, is refused and nothing is registered."""
    with pytest.raises(ValueError, match="no children"):
        tp.register(Attention)
    with pytest.raises(TypeError, match="out = 'row', required"):
        tp.register(Attention, out="row")
    assert find(Attention) is None


def test_double_underscores_are_dots(registered):
    """A keyword can lead into children of children."""
    tp.register(Attention, output__dense=Row())
    registered.append(Attention)
    assert list(find(Attention).children) == ["output.dense"]


def test_instances_of_a_replaced_class_remember_their_arguments():
    """A stand-in can be built with them; older instances are refused; unregistering undoes it."""

    class Old(nn.Module):
        def __init__(self, width, *, bias=True):
            super().__init__()

    init, before = Old.__init__, Old(1)
    tp.tp_register_with_module(Old, nn.Linear)
    try:
        assert isinstance(find(Old), Replacement)
        assert constructor_arguments(Old(3, bias=False)) == ((3,), {"bias": False})
        with pytest.raises(ValueError, match="built before its class was registered"):
            constructor_arguments(before)
    finally:
        tp.unregister(Old)
    assert Old.__init__ is init


def test_families_are_registered_by_name():
    """The tables are there without Transformers, each with the places of its classes."""
    gpt2 = list(plans("transformers.models.gpt2."))
    assert {child for plan in gpt2 for child in plan.children} >= {"c_attn", "c_proj", "wte"}
    assert all(plan.at for plan in gpt2)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (Column(), ("o i -> o i", 0)),
        (Column(heads="n"), ("(h d) i -> h d i", 0)),
        (Column(blocks=3, heads="n", stored="io"), ("i (b h d) -> b h d i", 1)),
        (Row(), ("o i -> o i", 1)),
        (Row(heads="n", stored="io"), ("(h d) o -> o h d", 1)),
        (VocabParallel(), ("v i -> v i", 0)),
    ],
)
def test_styles_name_their_layouts(style, expected):
    """A style's weight has the pattern from Hugging Face's axes and the dim that is cut."""
    layout = style.layouts["weight"]
    pattern, dim = expected
    assert layout.shard_dim == dim
    assert layout.pattern.text == pattern


def test_own_parameters_have_no_name_below_them():
    """A parameter of the annotated module itself is its own place."""
    assert list(OwnParameter("v -> v", cut="v").layouts) == [""]
