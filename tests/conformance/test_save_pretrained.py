"""Ordinary Hugging Face folders out of a parallel model."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

from tensorpar import hf_compat
from tensorpar.saving import pieces
from tests.conformance.families import CASES as FAMILIES
from tests.conformance.families import build
from tests.conformance.gpt2 import Case, batch, perturbed, refusal, require_close, weights_of
from tests.conformance.pretrained import tensors_in

CASES = {
    "tied": Case(),
    "untied": Case(config={"tie_word_embeddings": False}),
    "cross-attention": Case(config={"add_cross_attention": True}),
    "double": Case("GPT2DoubleHeadsModel"),
    "tokens": Case("GPT2ForTokenClassification", {"num_labels": 3}),
    "float32": Case(dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
}


def require_same_folders(ours: Path, theirs: Path) -> None:
    """The same files with the same bytes."""
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in theirs.iterdir():
        same = (ours / path.name).read_bytes() == path.read_bytes()
        assert same, f"{path.name} differs"


def saved(case: Case, folder: str) -> dict[str, bool]:
    """Save from all ranks; what the model itself is like afterwards."""
    model = perturbed(case, parallel=True)
    before = weights_of(model)
    assert model.save_pretrained(folder) is None
    after = weights_of(model)
    return {
        "unchanged": all(torch.equal(after[name], x) for name, x in before.items()),
        "still parallel": all(isinstance(p, DTensor) for p in model.parameters()),
        "written when it returns": (Path(folder) / "config.json").exists(),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_folder_is_the_one_transformers_writes(ranks, tmp_path, name, size):
    """Files, keys, tensors, configs and ties are those of Transformers' own save, byte for byte."""
    case, ours, theirs = CASES[name], tmp_path / "ours", tmp_path / "theirs"
    for found in ranks(size).run(saved, case, str(ours)):
        assert all(found.values()), found
    perturbed(case, parallel=False).save_pretrained(theirs)
    require_same_folders(ours, theirs)


#: smaller than a row of most matrices, which are 40 or 83 float64 wide.
SMALL_PIECES = 300
WAYS: dict[str, dict[str, Any]] = {
    "one file": {},
    "small pieces": {},
    "many files": {"max_shard_size": "30KB"},
    "variant": {"variant": "half", "max_shard_size": 60_000, "token": "none"},
    "no peft": {"save_peft_format": False, "save_original_format": False},
}


def saves(family: str, folder: str) -> None:
    """A family's base model and its language model saved in several ways."""
    for head in (FAMILIES[family].model, FAMILIES[family].heads[0]):
        model = build(family, head, parallel=True)
        for name, options in WAYS.items():
            with pytest.MonkeyPatch.context() as patch:
                if name == "small pieces":
                    patch.setattr(pieces, "PIECE_BYTES", SMALL_PIECES)
                model.save_pretrained(f"{folder}/{head}/{name}", **options)


@pytest.mark.feature("save_pretrained")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_and_argument(ranks, tmp_path, family, size):
    """One file or many, variants, pieces of any size: byte for byte what Transformers writes."""
    ranks(size).run(saves, family, str(tmp_path))
    for head in (FAMILIES[family].model, FAMILIES[family].heads[0]):
        model = build(family, head, parallel=False)
        for name, options in WAYS.items():
            theirs = tmp_path / "theirs"
            model.save_pretrained(theirs, **options)
            require_same_folders(tmp_path / head / name, theirs)
            shutil.rmtree(theirs)


def saves_again(folder: str, ways: list[dict[str, Any]]) -> None:
    """One model saved into one folder, time after time."""
    model = perturbed(Case(), parallel=True)
    for options in ways:
        model.save_pretrained(folder, **options)


@pytest.mark.parametrize("first", ["one file", "many files"])
@pytest.mark.parametrize("second", ["one file", "many files"])
def test_saving_over_a_folder(ranks, tmp_path, first, second):
    """Weights of the old save go; files and folders that are not the model's stay as they are."""
    (tmp_path / "out" / "runs").mkdir(parents=True)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "out" / "runs" / "log").write_text("step 1")
    inode = (tmp_path / "out" / "tokenizer.json").stat().st_ino
    ranks(2).run(saves_again, str(tmp_path / "out"), [WAYS[first], WAYS[second]])
    assert (tmp_path / "out" / "tokenizer.json").stat().st_ino == inode
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert (tmp_path / "out" / "runs" / "log").read_text() == "step 1"
    shutil.rmtree(tmp_path / "out" / "runs")
    perturbed(Case(), parallel=False).save_pretrained(tmp_path / "theirs", **WAYS[second])
    require_same_folders(tmp_path / "out", tmp_path / "theirs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theirs"]


def refusals(folder: str) -> list[str]:
    """What arguments are told that are not taken."""
    model = perturbed(Case(), parallel=True)
    given = (
        {"state_dict": {}},
        {"is_main_process": True},
        {"push_to_hub": True},
        {"distributed_checkpoint": True},
    )
    return [refusal(lambda g=g: model.save_pretrained(folder, **g)) for g in given]


def test_arguments_that_are_refused(ranks, tmp_path):
    """On every rank, with advice, and nothing is written."""
    for told in ranks(2).run(refusals, str(tmp_path / "out")):
        assert "call save_pretrained on every rank" in told[0]
        assert "call save_pretrained on every rank" in told[1]
        assert "upload_folder" in told[2]
        assert "state_dict()" in told[3]
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys, torch, transformers, tensorpar
from tensorpar.saving import own_parts
folder = sys.argv[1]
tensorpar.init(tensor_parallel_degree=1)
config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=4)
with tensorpar.tensor_parallelism():
    model = transformers.GPT2Model(config)
for parameter in model.parameters():
    torch.nn.init.ones_(parameter)
model.save_pretrained(folder, max_shard_size="2KB")
for parameter in model.parameters():
    torch.nn.init.zeros_(parameter)
write, written = own_parts.write_from, []
def killed(*args):
    write(*args)
    written.append(args)
    if len(written) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
own_parts.write_from = killed
model.save_pretrained(folder, max_shard_size="2KB")
"""


def test_a_killed_save_leaves_the_previous_model(tmp_path):
    """A process killed amid the shards of its second save leaves the first, whole."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")],
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    model = transformers.GPT2Model.from_pretrained(tmp_path / "out")
    assert all((parameter == 1).all() for parameter in model.parameters())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert all(name == "config.json" or name.startswith("model") for name in names)


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
    require_close(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"), 1e-10)


def test_pieces_cover_a_tensor_once(monkeypatch):
    """Every element lies in one piece, and pieces are no larger than they may be."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 64)
    for shape in ((), (3,), (40,), (5, 7), (2, 3, 9), (2, 100), (0, 4), (4, 0), (1, 1, 1)):
        counts = torch.zeros(shape)
        for piece in pieces.pieces(shape, 4):
            counts[piece] += 1
            assert counts[piece].numel() <= 16
        assert (counts == 1).all(), shape


def test_which_files_a_save_replaces():
    """Weights and indices of the same variant, and no other file."""
    plain, half = hf_compat.stale_weights(None), hf_compat.stale_weights("half")
    assert plain("model.safetensors")
    assert plain("model-00001-of-00002.safetensors")
    assert plain("model.safetensors.index.json")
    assert half("model.half-00001-of-00002.safetensors")
    assert half("model.safetensors.index.half.json")
    for name in (
        "model.half.safetensors",
        "config.json",
        "adapter_model.safetensors",
        "xmodel.bin",
    ):
        assert not plain(name)
    assert not half("model.safetensors")
    assert not half("modelxhalf.safetensors")
