"""One file per tensor-parallel rank, written and read by all ranks, at any two degrees."""

from __future__ import annotations

import json
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tensorpar
from tensorpar import sharded_files
from tensorpar.translators import merge
from tests.conformance.families import CASES, build
from tests.conformance.gpt2 import Case, perturbed, refusal, require_equal_ranks, weights_of
from tests.small_disk import small_disk_in

SHORT = timedelta(seconds=2)


def save(family: str, folder: str) -> dict[str, torch.Tensor]:
    """A perturbed model of a family; what it holds."""
    case = CASES[family]
    model = build(family, case.model, parallel=True)
    tensorpar.save_sharded(model, folder)
    return weights_of(model)


def load(family: str, folder: str) -> dict[str, torch.Tensor]:
    """A model with other values, filled from the files."""
    model = build(family, CASES[family].model, parallel=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    tensorpar.load_sharded(model, folder, verify=True)
    return weights_of(model)


@pytest.mark.feature("sharded files")
@pytest.mark.parametrize("family", CASES)
def test_any_degree_to_any_other(ranks, tmp_path, family):
    """Five heads on four ranks, then two, one and three; the last of four ranks has no head."""
    saved = ranks(4).run(save, family, str(tmp_path / "files"))
    require_equal_ranks(saved)
    for degree in (2, 3, 1):
        loaded = ranks(degree).run(load, family, str(tmp_path / "files"))
        require_equal_ranks(loaded)
        assert loaded[0].keys() == saved[0].keys()
        assert all(torch.equal(loaded[0][key], x) for key, x in saved[0].items())


def save_gpt2(folder: str) -> dict[str, torch.Tensor]:
    model = tensorpar.DistributedModel(perturbed(Case(), parallel=True))
    tensorpar.save_sharded(model, folder)
    return model.local_state_dict()


def test_files_are_readable_without_the_model(ranks, tmp_path):
    """Plain safetensors with local shapes; metadata tell the global ones; ties are stored once."""
    folder = tmp_path / "files"
    local = ranks(4).run(save_gpt2, str(folder))
    names = [f"tensorpar-0000{rank}-of-00004.safetensors" for rank in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == names
    files = [load_file(folder / name) for name in names]
    for held, file in zip(local, files, strict=True):
        assert held.keys() - file.keys() == {"lm_head.weight"}
        assert all(torch.equal(tensor, held[key]) for key, tensor in file.items())
    with safe_open(folder / names[3], framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format_version"], metadata["degree"], metadata["rank"]) == ("1", "4", "3")
    told = json.loads(metadata["tensors"])["transformer.h.0.attn.c_attn.weight"]
    assert {key: told[key] for key in ("shape", "dim", "start", "stop")} == {
        "shape": [3, 5, 8, 40],
        "dim": 1,
        "start": 5,
        "stop": 5,
    }
    assert json.loads(metadata["ties"]) == {"lm_head.weight": "transformer.wte.weight"}
    config = json.loads(metadata["config"])
    assert (config["model_type"], config["n_head"]) == ("gpt2", 5)
    assert merge(files, config)["transformer.wte.weight"].shape == (97, 40)


def count_bytes(folder: str) -> int:
    """What this rank reads of the files."""
    counted = []
    opened = sharded_files.opened_sharded

    def counting(path):
        context = opened(path)

        class Opened:
            def __enter__(self):
                counted.append(context.__enter__())
                return counted[-1]

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Opened()

    model = perturbed(Case(), parallel=True)
    sharded_files.opened_sharded = counting
    try:
        tensorpar.load_sharded(model, folder)
    finally:
        sharded_files.opened_sharded = opened
    needed = sum(p.to_local().nbytes for p in model.parameters())
    return sum(files.num_bytes_read for files in counted) - needed


def test_each_rank_reads_only_its_own_bytes(ranks, tmp_path):
    """Not one byte beyond its shards and the replicated parameters."""
    ranks(4).run(save_gpt2, str(tmp_path / "files"))
    assert ranks(3).run(count_bytes, str(tmp_path / "files")) == [0, 0, 0]


def save_twice(folder: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A second save replaces the first; other people's files are not touched."""
    model = perturbed(Case(), parallel=True)
    tensorpar.save_sharded(model, folder)
    with torch.no_grad():
        model.transformer.ln_f.bias.add_(1)
    tensorpar.save_sharded(model, folder)
    told = []
    path = Path(folder) / "mine.txt"
    if tensorpar.rank() == 0:
        path.write_text("mine")
    tensorpar.barrier()
    told.append(refusal(lambda: tensorpar.save_sharded(model, folder), ValueError))
    tensorpar.barrier()
    if tensorpar.rank() == 0:
        path.unlink()
    tensorpar.barrier()
    wanted = weights_of(model)
    tensorpar.load_sharded(model, folder)
    require_equal_ranks([wanted, weights_of(model)])
    return wanted, told


def test_a_second_save_replaces_the_first(ranks, tmp_path):
    """As a whole; a folder with anything else in it is refused on every rank."""
    for _, told in ranks(2).run(save_twice, str(tmp_path / "files")):
        assert "holds ['mine.txt'], required: a new or empty folder" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def full_disk(folder: str) -> list[str]:
    """What ranks are told when one of them cannot write on."""
    model = perturbed(Case(), parallel=True)
    tensorpar.save_sharded(model, folder)
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    small = small_disk_in(sharded_files._Save, "write", 20_000)
    with small if tensorpar.rank() == 1 else nullcontext():
        told = refusal(lambda: tensorpar.save_sharded(model, folder), OSError)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == before
    tensorpar.barrier()
    return [told, *(path.name for path in Path(folder).parent.iterdir())]


def test_a_full_disk_on_one_rank_is_an_error_on_all(ranks, tmp_path):
    """The earlier save is as it was, and nothing is left beside it."""
    told = ranks(2).run(full_disk, str(tmp_path / "files"))
    assert "File too large" in told[1][0]
    assert "save_sharded failed on other ranks, and here for that: rank 1" in told[0][0]
    assert told[0][1:] == ["files"]


def load_broken(folder: str, head: str, verify: bool) -> str:
    """The refusal, after which the model is what it was."""
    model = perturbed(Case(head), parallel=True)
    before = weights_of(model)
    told = refusal(lambda: tensorpar.load_sharded(model, folder, verify=verify), ValueError)
    require_equal_ranks([before, weights_of(model)])
    return told


def save_other(folder: str) -> None:
    """A model that differs in a tensor of the last rank only."""
    model = perturbed(Case(), parallel=True)
    with torch.no_grad():
        model.transformer.wte.weight.to_local().mul_(1 + (tensorpar.rank() == 2))
    tensorpar.save_sharded(model, folder)


def test_files_that_do_not_fit_or_are_damaged_are_refused(ranks, tmp_path):
    """On every rank, and nothing is written."""
    folder = tmp_path / "files"
    ranks(3).run(save_gpt2, str(folder))
    for told in ranks(2).run(load_broken, str(folder), "GPT2ForTokenClassification", False):
        assert "classifier.weight (2, 40) is missing" in told
    path = folder / "tensorpar-00001-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told = ranks(2).run(load_broken, str(folder), "GPT2LMHeadModel", True)
    assert "is damaged: ['transformer.wte.weight'] are not what was saved" in told[1]
    assert "failed on other ranks" in told[0]
    path.unlink()
    ranks(3).run(save_other, str(tmp_path / "other"))
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
    for told in ranks(2).run(load_broken, str(folder), "GPT2LMHeadModel", False):
        assert "rank 1 has another checkpoint than rank 0" in told
    path.unlink()
    for told in ranks(2).run(load_broken, str(folder), "GPT2LMHeadModel", False):
        assert "tensorpar-00001-of-00003.safetensors" in told


def one_is_missing(folder: str) -> str:
    model = perturbed(Case(), parallel=True)
    tensorpar.barrier()
    if tensorpar.rank() == 1:
        return ""
    return refusal(lambda: tensorpar.save_sharded(model, folder, timeout=SHORT), TimeoutError)


def test_a_missing_rank_ends_in_a_timeout(ranks, tmp_path):
    """And nothing is written."""
    told = ranks(2).run(one_is_missing, str(tmp_path / "files"))
    assert "save_sharded was not called by ranks [1] within 2 s" in told[0]
    assert not list(tmp_path.iterdir())


def fully_sharded(folder: str) -> bool:
    """Files from a model whose parameters data parallelism shards too."""
    from torch.distributed.fsdp import fully_shard

    model = perturbed(Case(), parallel=True)
    tensorpar.save_sharded(model, f"{folder}/before")
    fully_shard(model, mesh=tensorpar.dp_mesh())
    tensorpar.save_sharded(model, f"{folder}/after")
    told = refusal(lambda: tensorpar.load_sharded(model, f"{folder}/after"), ValueError)
    return "load before fully_shard" in told


def test_models_under_fully_shard_are_saved_too(ranks, tmp_path):
    """The same bytes as without it."""
    assert all(ranks(4, tensor_parallel_degree=2).run(fully_sharded, str(tmp_path)))
    before = {path.name: path.read_bytes() for path in (tmp_path / "before").iterdir()}
    after = {path.name: path.read_bytes() for path in (tmp_path / "after").iterdir()}
    assert before == after
    assert len(after) == 2
