"""What every translate function promises whatever the family's table says."""

from __future__ import annotations

import importlib
import pickle

import numpy as np
import pytest
import torch
import transformers

from tensorpar.translators import (
    from_hf,
    hf_to_smdistributed,
    merge,
    reshard,
    smdistributed_to_hf,
    split,
    to_hf,
)
from tests.families import FAMILIES, FamilyCase

ALIASES = ("translate_hf_state_dict_to_smdistributed", "translate_state_dict_to_smdistributed")
ALIASES_OF = {
    "gptj": (
        "translate_hf_gptj_state_dict_to_smdistributed_gptj",
        "translate_hf_gptj_state_dict_to_smdistributed",
    ),
    "gptneo": ("translate_hf_gptneo_state_dict_to_smdistributed",),
}
every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def gpt2():
    """A config and a state dict."""
    config = FAMILIES[0].config()
    return config, FAMILIES[0].state_dict(config)


def functions(case: FamilyCase):
    """The family's module, and its three translate functions."""
    module = importlib.import_module(f"tensorpar.translators.{case.name}")
    return (
        module,
        getattr(module, f"translate_state_dict_to_hf_{case.name}"),
        getattr(module, f"translate_hf_state_dict_to_smdistributed_{case.name}"),
        getattr(module, f"translate_hf_state_dict_to_tensorpar_{case.name}"),
    )


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert np.array_equal(left[key], right[key]), key


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_models_own_state_dict_comes_back_and_loads(case, dtype):
    """Through both layouts, by the family's functions; Transformers takes it strictly."""
    config = case.config(**case.variants[-1])
    _, to_hf_, to_smd, to_ours = functions(case)
    model = getattr(transformers, case.model)(config).to(dtype)
    twin = getattr(transformers, case.model)(config).to(dtype)
    s = model.state_dict()
    for there in (to_ours(s, config), to_smd(s), split(to_ours(s, config), config, 3)):
        back = to_hf_(there)
        assert back.keys() == s.keys()
        twin.load_state_dict(back)
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
        )


@every_family
def test_a_translated_model_computes_the_same(case):
    """The file that comes out of the round trip is the same model to Transformers."""
    config = case.config()
    models = [getattr(transformers, case.model)(config).eval() for _ in range(2)]
    s = from_hf(models[0].state_dict(), config)
    models[1].load_state_dict(to_hf(merge(split(s, config, 4), config), config))
    ids = torch.arange(12).view(2, 6)
    logits = [model(input_ids=ids).logits for model in models]
    assert torch.equal(*logits)


@every_family
def test_nothing_is_changed(case):
    """The input's keys, tensors and values are afterwards as before."""
    config = case.config(**case.variants[-1])
    hf = case.state_dict(config)
    ours, smd = from_hf(hf, config), hf_to_smdistributed(hf, config)
    _, to_hf_, to_smd, to_ours = functions(case)
    for given, translate in (
        (hf, to_smd),
        (hf, lambda s: to_ours(s, config)),
        (ours, lambda s: to_hf_(s, 8)),
        (smd, lambda s: to_hf_(s, 8)),
        (ours, lambda s: reshard(split(s, config, 3), config, 2)),
    ):
        before = {key: (tensor, tensor.clone(), tensor._version) for key, tensor in given.items()}
        translate(given)
        assert list(given) == list(before)
        for key, (tensor, values, version) in before.items():
            assert given[key] is tensor
            assert tensor._version == version
            assert torch.equal(tensor, values)


@every_family
def test_numpy_in_numpy_out(case):
    """Read-only and reversed arrays too; a mixture comes out as tensors."""
    config = case.config()
    hf = case.state_dict(config)
    arrays = {key: tensor.numpy().copy() for key, tensor in hf.items()}
    first = next(iter(arrays))
    arrays[first] = arrays[first][::-1]
    for array in arrays.values():
        array.flags.writeable = False
    smd, ours = hf_to_smdistributed(arrays, config), from_hf(arrays, config)
    shards = split(ours, config, 3)
    for made in (smd, ours, *shards, merge(shards, config)):
        assert all(isinstance(array, np.ndarray) for array in made.values())
    assert_same(smdistributed_to_hf(smd, config), arrays)
    assert_same(to_hf(shards, config), arrays)
    mixture = to_hf({**ours, first: torch.from_numpy(ours[first].copy())}, config)
    assert all(isinstance(tensor, torch.Tensor) for tensor in mixture.values())


def test_parameters_come_out_detached(gpt2):
    """Views of a parameter that requires grad could not be loaded into."""
    config, hf = gpt2
    wanting = {key: torch.nn.Parameter(tensor) for key, tensor in hf.items()}
    assert not any(tensor.requires_grad for tensor in from_hf(wanting, config).values())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1}, "wte.weight is a dict, required: a tensor or a NumPy array"),
        (np.zeros(3, dtype="U1"), r"wte.weight is can't convert np.ndarray"),
    ],
)
def test_what_is_no_tensor_is_named(gpt2, value, message):
    """A whole training checkpoint, say."""
    config, hf = gpt2
    with pytest.raises(ValueError, match=message):
        from_hf({**hf, "transformer.wte.weight": value}, config)


@pytest.mark.parametrize("translate", [split, merge, reshard])
def test_wrong_numbers_of_ranks_are_refused(gpt2, translate):
    """No dict, one dict for many, degree 0."""
    config, hf = gpt2
    for args in {
        split: [(from_hf(hf, config), config, 0), (from_hf(hf, config), config, 2.0)],
        merge: [([], config), (hf, config)],
        reshard: [([hf], config, -1), ([], config, 1)],
    }[translate]:
        with pytest.raises(ValueError, match="required"):
            translate(*args)


@every_family
def test_functions_are_found_and_pickled_by_their_names(case):
    """In the family's module and under the path that scripts import."""
    module, *named = functions(case)
    legacy = importlib.import_module(f"tensorpar.nn.huggingface.{case.name}")
    for function in named:
        assert pickle.loads(pickle.dumps(function)) is function
        assert function.__doc__
    for name in dir(module):
        if name.startswith("translate_"):
            assert getattr(legacy, name) is getattr(module, name)


@every_family
def test_aliases_take_a_second_argument_or_none(case):
    """All names that scripts use, under both paths."""
    hf = case.state_dict(case.config())
    module, _, to_smd, _ = functions(case)
    legacy = importlib.import_module(f"tensorpar.nn.huggingface.{case.name}")
    smd = to_smd(hf)
    for name in (*ALIASES, *ALIASES_OF.get(case.name, ())):
        for function in (getattr(module, name), getattr(legacy, name)):
            for rest in ((), (None,), (64,)):
                assert_same(function(hf, *rest), smd)


def test_the_layer_only_alias_takes_a_second_argument_or_none(gpt2):
    """GPT-2 alone has it."""
    config, hf = gpt2
    module, to_hf_, to_smd, to_ours = functions(FAMILIES[0])
    for function in (module.translate_state_dict_to_hf_gpt2_layer, to_hf_):
        assert_same(function(to_smd(hf)), hf)
        assert_same(function(to_ours(hf, config), None), hf)
