"""Hugging Face folders of every family into a parallel model and out of it; shards are uneven."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import tensorpar
from tensorpar.gathering import gathered_state_dict, hf_layout
from tensorpar.translators import hf_to_smdistributed, load_hf, save_hf
from tests.families import CASES


def model_of(family: str):
    """The model with a language modelling head, and cross-attention where there is such."""
    case = CASES[family]
    return getattr(transformers, case.model)(case.config(**case.variants[-1]))


def gathered(model) -> dict[str, torch.Tensor]:
    """In Hugging Face's layout."""
    return hf_layout(model, gathered_state_dict(model, to_rank0=False, call="test"))


def load_and_save(family: str, folder: Path, out: Path) -> dict[str, torch.Tensor]:
    with tensorpar.tensor_parallelism():
        model = model_of(family)
    load_hf(model, folder)
    save_hf(model, out)
    return gathered(model)


def load_smdistributed(family: str, hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with tensorpar.tensor_parallelism():
        model = tensorpar.DistributedModel(model_of(family))
    model.load_state_dict(hf_to_smdistributed(hf, model.get_module().config))
    return gathered(model.get_module())


def state_dict(family: str) -> dict[str, torch.Tensor]:
    case = CASES[family]
    return case.state_dict(case.config(**case.variants[-1]))


def assert_all(results, hf) -> None:
    for result in results:
        assert result.keys() == hf.keys()
        assert all(torch.equal(result[key], hf[key]) for key in hf)


@pytest.mark.parametrize("family", list(CASES))
def test_folders_in_and_out(ranks, tmp_path, family):
    """What Transformers saved, in uneven shards on every rank, and saved for it again."""
    hf = state_dict(family)
    model = model_of(family)
    model.load_state_dict(hf)
    model.save_pretrained(tmp_path / "in")
    assert_all(ranks(2).run(load_and_save, family, tmp_path / "in", tmp_path / "out"), hf)
    again = type(model).from_pretrained(tmp_path / "out")
    assert_all([again.state_dict()], hf)


@pytest.mark.parametrize("family", list(CASES))
def test_smdistributed_layout_in(ranks, family):
    """Recognised and loaded by the model itself."""
    hf = state_dict(family)
    assert_all(ranks(2).run(load_smdistributed, family, hf), hf)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_positions_of_old_versions(ranks, tmp_path, family):
    """A buffer that current versions do not keep is no unknown key."""
    hf = state_dict(family)
    old = {key: tensor.clone() for key, tensor in hf.items()}
    old[f"{family}.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(old, tmp_path / "model.safetensors")
    assert_all(ranks(2).run(load_and_save, family, tmp_path, tmp_path / "out"), hf)
