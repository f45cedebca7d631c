"""Ordinary Hugging Face folders out of a parallel model, and into one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

import tensorpar
from tests.conformance.gpt2 import (
    Case,
    Tensors,
    batch,
    config,
    detached,
    perturbed,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)

CASES = {
    "tied": Case(),
    "untied": Case(config={"tie_word_embeddings": False}),
    "cross-attention": Case(config={"add_cross_attention": True}),
    "base": Case("GPT2Model"),
    "double": Case("GPT2DoubleHeadsModel"),
    "tokens": Case("GPT2ForTokenClassification", {"num_labels": 3}),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
}


def saved(case: Case, folder: str, options: dict[str, Any]) -> dict[str, bool]:
    """Save from all ranks; what the model itself is like afterwards."""
    model = perturbed(case, parallel=True)
    before = weights_of(model)
    assert model.save_pretrained(folder, **options) is None
    after = weights_of(model)
    return {
        "unchanged": all(torch.equal(after[name], x) for name, x in before.items()),
        "still parallel": all(isinstance(p, DTensor) for p in model.parameters()),
        "written when it returns": (Path(folder) / "config.json").exists(),
    }


def _tensors_in(folder: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def _require_same_folders(ours: Path, theirs: Path) -> None:
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in theirs.glob("*.json"):
        left, right = (json.loads((folder / path.name).read_text()) for folder in (ours, theirs))
        assert left == right, path.name
    left, right = _tensors_in(ours), _tensors_in(theirs)
    assert left.keys() == right.keys()
    for name, x in right.items():
        assert left[name].dtype == x.dtype
        assert torch.equal(left[name], x), name


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_folder_is_the_one_transformers_writes(ranks, tmp_path, name, size):
    """Files, keys, tensors, configs and ties are those of Transformers' own save, byte for byte."""
    case, ours, theirs = CASES[name], tmp_path / "ours", tmp_path / "theirs"
    for found in ranks(size).run(saved, case, str(ours), {}):
        assert all(found.values()), found
    reference = perturbed(case, parallel=False)
    reference.save_pretrained(theirs)
    _require_same_folders(ours, theirs)
    loaded = getattr(transformers, case.head).from_pretrained(ours, dtype=case.dtype)
    assert all(
        torch.equal(x, reference.state_dict()[name]) for name, x in loaded.state_dict().items()
    )


def test_options_of_saving_reach_transformers(ranks, tmp_path):
    """`max_shard_size` splits the file as Transformers does, with an index."""
    options = {"max_shard_size": "30KB"}
    ranks(2).run(saved, Case(), str(tmp_path / "ours"), options)
    perturbed(Case(), parallel=False).save_pretrained(tmp_path / "theirs", **options)
    _require_same_folders(tmp_path / "ours", tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1


def save_arguments(folder: str) -> list[str]:
    """What arguments that would let ranks act alone are told."""
    model = perturbed(Case(), parallel=True)
    told = []
    for refused in ({"state_dict": {}}, {"is_main_process": True}):
        with pytest.raises(ValueError, match="call save_pretrained on every rank") as refusal:
            model.save_pretrained(folder, **refused)
        told.append(str(refusal.value))
    return told


def test_saving_alone_is_refused(ranks, tmp_path):
    """`state_dict` and `is_main_process` are refused on every rank and nothing is written."""
    for told in ranks(2).run(save_arguments, str(tmp_path / "out")):
        assert "state_dict" in told[0]
        assert "is_main_process" in told[1]
    assert not (tmp_path / "out").exists()


def loaded(case: Case, folder: str, options: dict[str, Any], parallel: bool) -> Tensors:
    """Weights, outputs and loading report of a model from a folder."""
    torch.manual_seed(0)
    cls = getattr(transformers, case.head)
    with tensorpar.tensor_parallelism() if parallel else nullcontext():
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert all(isinstance(p, DTensor) == parallel for p in model.parameters())
    with torch.no_grad():
        seen = detached(tensors_of(model.eval()(**batch(case))), "eval")
    seen |= detached(weights_of(model), "weight")
    report = {key: sorted(map(str, value)) for key, value in info.items() if value}
    seen[f"training {model.training} report {report}"] = torch.zeros(1)
    return seen


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("stored", "case", "options"),
    [
        (Case(), Case(labels=False), {}),
        (Case(), Case("AutoModelForCausalLM"), {}),
        (Case(), Case("GPT2Model"), {}),
        (Case("GPT2Model"), Case(labels=False), {}),
        (Case(), Case("GPT2ForTokenClassification"), {"num_labels": 2}),
        (Case(config={"tie_word_embeddings": False}), Case(labels=False), {}),
        (Case(), Case(labels=False, dtype=torch.float32), {"dtype": torch.float32}),
        (Case(), Case(labels=False), {"attn_implementation": "eager"}),
    ],
    ids=["same", "auto", "base", "from base", "new head", "untied", "float32", "eager"],
)
def test_from_pretrained_inside_the_context(ranks, tmp_path, stored, case, options, size):
    """Values, outputs and the report of missing keys are Transformers', at any degree."""
    perturbed(stored, parallel=False).save_pretrained(tmp_path, max_shard_size="30KB")
    given = {"dtype": torch.float64, **options}
    if case.head == "AutoModelForCausalLM":
        case, given = Case("GPT2LMHeadModel", labels=False), given
    results = ranks(size).run(loaded, case, str(tmp_path), given, True)
    require_equal_ranks(results)
    tolerance = 1e-10 if case.dtype is torch.float64 and case.head != "GPT2LMHeadModel" else 1e-5
    require_close(results[0], loaded(case, str(tmp_path), given, False), tolerance)


def auto_loaded(folder: str) -> tuple[bool, str]:
    """What the automatic class gives within the context."""
    with tensorpar.tensor_parallelism():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        ok = model.generate(batch(Case())["input_ids"], max_new_tokens=2).shape == (3, 13)
    return ok and all(isinstance(p, DTensor) for p in model.parameters()), type(model).__name__


def test_the_automatic_class_and_use_within_the_context(ranks, tmp_path):
    """`AutoModelForCausalLM.from_pretrained` gives a parallel model, usable at once."""
    perturbed(Case(dtype=torch.float32), parallel=False).save_pretrained(tmp_path)
    assert ranks(2).run(auto_loaded, str(tmp_path)) == [(True, "GPT2LMHeadModel")] * 2


def failing_loads(folder: str) -> dict[str, bool]:
    """What loads that fail leave behind in an open context."""
    found = {}
    with tensorpar.tensor_parallelism():
        with pytest.raises(OSError, match="nowhere"):
            transformers.GPT2LMHeadModel.from_pretrained(f"{folder}/nowhere")
        with pytest.raises(RuntimeError, match="mismatch"):
            transformers.GPT2LMHeadModel.from_pretrained(folder, vocab_size=50)
        model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        built = transformers.GPT2LMHeadModel(config(Case()))
        found["next load"] = all(isinstance(p, DTensor) for p in model.parameters())
        found["next model"] = all(isinstance(p, DTensor) for p in built.parameters())
    return found


def test_failing_loads_leave_the_context_fine(ranks, tmp_path):
    """A missing folder, or shapes that do not fit, raise as ever; the next load is parallel."""
    perturbed(Case(dtype=torch.float32), parallel=False).save_pretrained(tmp_path)
    for found in ranks(2).run(failing_loads, str(tmp_path)):
        assert all(found.values()), found


def trained_and_saved(folder: str, parallel: bool) -> None:
    """One step, then save."""
    model = perturbed(Case(), parallel=parallel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(batch(Case())["input_ids"]).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(33)).backward()
    optimizer.step()
    model.save_pretrained(folder)


def test_a_trained_model_is_saved_as_trained(ranks, tmp_path):
    """After a step the saved tensors are those of the step in one process."""
    ranks(4).run(trained_and_saved, str(tmp_path / "ours"), True)
    trained_and_saved(str(tmp_path / "theirs"), False)
    require_close(_tensors_in(tmp_path / "ours"), _tensors_in(tmp_path / "theirs"), 1e-10)
