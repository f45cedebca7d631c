"""Hugging Face folders into a parallel model and out of it, on ranks that hold uneven shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import tensorpar
from tensorpar.gathering import gathered_state_dict, hf_layout
from tensorpar.translators import from_hf, load_hf, merge, save_hf
from tensorpar.translators.safetensors_folder import opened_folder
from tests.families import FAMILIES

CASE = FAMILIES[0]
CONFIG = {"add_cross_attention": True}


def parallel_model(name: str = CASE.model) -> torch.nn.Module:
    with tensorpar.tensor_parallelism():
        return getattr(transformers, name)(CASE.config(**CONFIG))


def gathered(model) -> dict[str, torch.Tensor]:
    """In Hugging Face's layout."""
    whole = gathered_state_dict(model, to_rank0=False, call="test")
    return hf_layout(model, whole)


def load_and_gather(folder: Path, name: str = CASE.model, wrapped: bool = False):
    model = parallel_model(name)
    load_hf(tensorpar.DistributedModel(model) if wrapped else model, folder)
    if name == CASE.model:
        assert model.lm_head.weight is model.transformer.wte.weight
    return gathered(model)


def load_and_save(folder: Path, out: Path) -> None:
    model = parallel_model()
    load_hf(model, folder)
    save_hf(model, out)


def refuse_and_compare(folder: Path) -> str:
    """The error, after which the model is what it was."""
    model = parallel_model()
    before = gathered(model)
    with pytest.raises(ValueError, match=r"required|missing|unknown") as error:
        load_hf(model, folder)
    after = gathered(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(error.value)


def translate_dtensors() -> str:
    """A whole DTensor is its local tensor; one of which a rank holds a part is refused."""
    config = CASE.config()
    hf = CASE.state_dict(config)
    mesh = tensorpar.tp_mesh()
    whole = {key: distribute_tensor(tensor, mesh) for key, tensor in hf.items()}
    ours = from_hf(whole, config)
    assert not any(isinstance(tensor, DTensor) for tensor in ours.values())
    assert torch.equal(ours["lm_head.weight"], hf["lm_head.weight"])
    with pytest.raises(ValueError, match=r"a DTensor, required: plain tensors"):
        merge([whole], config)
    part = distribute_tensor(hf["lm_head.weight"], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="problem") as error:
        from_hf({**hf, "lm_head.weight": part}, config)
    return str(error.value)


@pytest.fixture
def hf():
    return CASE.state_dict(CASE.config(**CONFIG))


def folder_of(path: Path, tensors: dict[str, torch.Tensor], *, files: int = 1) -> Path:
    """A folder as Transformers writes it; tied weights once."""
    model = getattr(transformers, CASE.model)(CASE.config(**CONFIG))
    size = "1GB" if files == 1 else 20_000
    model.save_pretrained(path, state_dict=dict(tensors), max_shard_size=size)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (files > 1)
    return path


def assert_all(results, hf) -> None:
    for result in results:
        assert result.keys() == hf.keys()
        assert all(torch.equal(result[key], hf[key]) for key in hf)


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_rank_fills_its_shards(ranks, tmp_path, hf, files, wrapped):
    """One file or an index of many; tied weights stay tied."""
    folder = folder_of(tmp_path, hf, files=files)
    assert_all(ranks(2).run(load_and_gather, folder, CASE.model, wrapped), hf)


def test_what_is_saved_is_what_was_loaded(ranks, tmp_path, hf):
    """And Transformers reads it."""
    folder = folder_of(tmp_path / "in", hf)
    ranks(2).run(load_and_save, folder, tmp_path / "out")
    model = getattr(transformers, CASE.model).from_pretrained(tmp_path / "out")
    assert_all([model.state_dict()], hf)


def test_prefixes_and_old_buffers(ranks, tmp_path, hf):
    """A base model's file in a model with a head, the reverse, and masks of old versions."""
    base = {k.removeprefix("transformer."): v for k, v in hf.items() if k != "lm_head.weight"}
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    save_file(base | {"h.0.attn.bias": mask}, tmp_path / "model.safetensors")
    assert_all(ranks(2).run(load_and_gather, tmp_path), hf)
    prefixed = {f"transformer.{key}": tensor for key, tensor in base.items()}
    save_file(prefixed, tmp_path / "other.safetensors")
    assert_all(ranks(2).run(load_and_gather, tmp_path / "other.safetensors", "GPT2Model"), base)


def test_everything_that_does_not_fit_is_listed_and_nothing_written(ranks, tmp_path, hf):
    """Missing, unknown and mis-shaped keys in one error, on every rank."""
    broken = {k: v for k, v in hf.items() if k not in ("lm_head.weight", "transformer.ln_f.bias")}
    broken["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(83, 40)
    broken["transformer.h.2.ln_1.bias"] = torch.zeros(40)
    save_file(broken, tmp_path / "model.safetensors")
    for told in ranks(2).run(refuse_and_compare, tmp_path):
        assert "does not fit the GPT2LMHeadModel, 3 problems" in told
        assert "transformer.ln_f.bias (40,) is missing" in told
        assert "transformer.h.0.mlp.c_fc.weight has shape (83, 40), required (40, 83)" in told
        assert "transformer.h.2.ln_1.bias (40,) is unknown" in told


def test_dtensors_of_which_a_rank_holds_a_part_are_refused(ranks):
    """Translators never communicate; the error names who does."""
    for told in ranks(2).run(translate_dtensors):
        assert "1 problem: lm_head.weight is a DTensor" in told
        assert "DistributedModel.state_dict" in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.bin", b"", "required: a folder with model.safetensors"),
        ("model.safetensors", b"1234", "cannot be read"),
        ("model.safetensors.index.json", b"{}", "is not an index"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "../x"}}', "its own folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "x"}}', "x cannot be read"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, name, content, message):
    """Told before anything is filled."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message), opened_folder(tmp_path):
        pass


def test_a_truncated_file_is_refused(tmp_path, hf):
    """The length in its header is checked when it is opened."""
    folder = folder_of(tmp_path, hf)
    file = folder / "model.safetensors"
    assert load_file(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read"), opened_folder(folder):
        pass


def test_only_models_that_can_are_saved(tmp_path):
    """A module of the user's own has no Hugging Face folder."""
    with pytest.raises(ValueError, match="a Linear without save_pretrained"):
        save_hf(torch.nn.Linear(1, 1), tmp_path)
