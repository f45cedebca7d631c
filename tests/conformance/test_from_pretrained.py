"""`from_pretrained` under tensor parallelism: Transformers' values and reports, from slices."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor

import tensorpar
from tensorpar import hf_construction, loading
from tests.conformance.families import CASES, build
from tests.conformance.gpt2 import refusal
from tests.conformance.pretrained import (
    Loaded,
    load,
    require_same,
    rewritten,
    stored,
    tensors_in,
)

CLASSIFIERS = {
    "gpt2": "GPT2ForSequenceClassification",
    "bert": "BertForPreTraining",
    "roberta": "RobertaForTokenClassification",
    "gptj": "GPTJForQuestionAnswering",
    "gptneo": "GPTNeoForTokenClassification",
    "gptneox": "GPTNeoXForSequenceClassification",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str, str], Path]:
    """Folders of Transformers' own, by family and class, each made once, in several files."""
    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, head: str) -> Path:
        if (family, head) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{head}")
            made[family, head] = stored(family, head, path, max_shard_size="60KB")
        return made[family, head]

    return folder


def loads(ways: list[tuple[str, str]], options: dict[str, Any]) -> list[Loaded]:
    """Several loads in one job."""
    return [load(head, folder, options, True) for head, folder in ways]


@pytest.mark.feature("from_pretrained by slices")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(CASES))
def test_every_class_from_every_checkpoint(ranks, folders, family, size):
    """Heads from base and other heads' files, base from heads': values, report, log, ties, bytes.

    What is newly initialised equals Transformers' at the same seed, on all ranks, and no rank asks
    for a byte beyond its slices but the few values by which files are compared.
    """
    case = CASES[family]
    base, lm, classifier = case.heads[0], case.model, CLASSIFIERS[family]
    pairs = [(lm, lm), (lm, base), (base, lm), (base, classifier), (lm, classifier)]
    ways = [(head, str(folders(family, source))) for source, head in pairs]
    results = ranks(size).run(loads, ways, {"dtype": "auto"})
    for place, (head, folder) in enumerate(ways):
        theirs = load(head, folder, {"dtype": "auto"}, False)
        for result in results:
            ours = result[place]
            require_same(ours, theirs)
            assert 0 < ours.num_bytes <= ours.needed + ours.slack
    whole = sum(x.nbytes for x in tensors_in(folders(family, lm)).values())
    assert all(result[0].num_bytes < whole for result in results)


def used(folder: str) -> dict[str, Any]:
    """What a model of the automatic class is good for at once, and which bars its loading shows."""
    bars, bar = [], loading.tqdm

    def watched(*args: Any, **kwargs: Any) -> Any:
        bars.append(not kwargs["disable"])
        return bar(*args, **kwargs)

    loading.tqdm = watched  # type: ignore[misc]
    try:
        with tensorpar.tensor_parallelism():
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            tokens = model.generate(torch.arange(3)[None] + 7, max_new_tokens=4, do_sample=False)
    finally:
        loading.tqdm = bar  # type: ignore[misc]
    owners = [p.to_local().untyped_storage() for p in model.parameters()]
    return {
        "tokens": tokens.tolist(),
        "bars": bars,
        "owns no more than its part": sum(storage.nbytes() for storage in owners)
        == sum(p.to_local().nbytes for p in model.parameters()),
    }


def test_a_loaded_model_is_used(ranks, tmp_path):
    """It generates as one process does; the first rank alone shows a bar; parts own themselves."""
    folder = str(stored("gpt2", "GPT2LMHeadModel", tmp_path))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    expected = model.generate(torch.arange(3)[None] + 7, max_new_tokens=4, do_sample=False)
    for rank, found in enumerate(ranks(2).run(used, folder)):
        assert found["tokens"] == expected.tolist()
        assert found["bars"] == [rank == 0]
        assert found["owns no more than its part"]


def from_another(family: str) -> dict[str, str]:
    """What models made of a parallel one's state dict do not have from it, by way and name."""
    source = build(family, CASES[family].model, parallel=True)
    base, wrong = source.base_model, {}
    for way, cls, given in (
        ("same", type(source), source),
        ("base", type(base), source),
        ("head", type(source), base),
    ):
        how = {"config": source.config, "dtype": torch.float64}
        with tensorpar.tensor_parallelism():
            model = cls.from_pretrained(None, state_dict=given.state_dict(), **how)
        mine, theirs = (model, source) if way == "same" else (model.base_model, base)
        own = dict(mine.named_parameters())
        for name, value in theirs.named_parameters():
            same = own[name].placements == value.placements and own[name] is not value
            if not same or not torch.equal(own[name].to_local(), value.to_local()):
                wrong[f"{way} {name}"] = str(own[name].placements)
    return wrong


@pytest.mark.feature("from_pretrained with a parallel model's state dict")
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_state_dict_of_a_parallel_model(ranks, family):
    """Sharded tensors in tensorpar layout are loaded: by the class, its base, and a head on it."""
    assert ranks(2).run(from_another, family) == [{}, {}]


def failing_loads(folder: str, other: str) -> dict[str, list[str]]:
    """What ranks are told when loads fail, on all or on one; the next load is parallel."""
    cls, mine = transformers.GPT2LMHeadModel, tensorpar.rank() == 1
    told = {}
    with tensorpar.tensor_parallelism():

        def on_one(name: str, path: str) -> None:
            error = refusal(lambda: cls.from_pretrained(path if mine else folder), Exception)
            told[name] = error

        told["nowhere"] = refusal(lambda: cls.from_pretrained(f"{folder}/nowhere"), OSError)
        told["mismatch"] = refusal(lambda: cls.from_pretrained(folder, vocab_size=9), RuntimeError)
        told["truncated"] = refusal(lambda: cls.from_pretrained(f"{other}/truncated"))
        told["pickle"] = refusal(lambda: cls.from_pretrained(f"{other}/pickle"))
        on_one("nowhere on one", f"{folder}/nowhere")
        on_one("truncated on one", f"{other}/truncated")
        on_one("other weights on one", f"{other}/changed")
        model = cls.from_pretrained(folder)
        told["next load"] = str(all(isinstance(p, DTensor) for p in model.parameters()))
    return told


def test_failing_loads_are_every_ranks(ranks, tmp_path):
    """Transformers' errors on all ranks; what fails on one rank is an error on all, and no hang."""
    folder = stored("gpt2", "GPT2LMHeadModel", tmp_path / "good")
    for name in ("truncated", "pickle", "changed"):
        shutil.copytree(folder, tmp_path / name)
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (tmp_path / "pickle" / "model.safetensors").unlink()
    with (tmp_path / "pickle" / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": SimpleNamespace(b=1)}, file)
    rewritten(tmp_path / "changed", lambda tensors: {n: x + 1 for n, x in tensors.items()})
    told = ranks(2).run(failing_loads, str(folder), str(tmp_path))
    for rank, one in enumerate(told):
        assert "nowhere" in one["nowhere"]
        assert "mismatched" in one["mismatch"]
        assert "whole safetensors file" in one["truncated"]
        assert "required: safetensors, or a pickle of tensors" in one["pickle"]
        assert "hold different models" in one["other weights on one"]
        assert one["next load"] == "True"
        for name, of_the_one in (
            ("nowhere on one", "is not a local folder"),
            ("truncated on one", "whole safetensors file"),
        ):
            if rank == 1:
                assert of_the_one in one[name] or "nowhere" in one[name]
            else:
                assert "loading = done on rank 0, " in one[name]
                assert of_the_one in one[name] or "nowhere" in one[name]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"hf_quantizer": object()}, "packed weights cannot be sharded"),
        ({"device_mesh": object()}, "the degree is that of tensorpar.init"),
        ({"device_map": {"a": "cpu", "b": "disk"}}, "placed on its own device"),
        ({"device_map": {"": "cpu"}}, ""),
    ],
)
def test_ways_of_loading_that_are_refused(how, told):
    """Quantized weights, another tensor parallelism, several devices: with advice."""
    given = SimpleNamespace(
        **{"hf_quantizer": None, "device_mesh": None, "device_map": None, **how}
    )
    if told:
        assert told in refusal(lambda: hf_construction._refuse_placement(given))
    else:
        hf_construction._refuse_placement(given)
