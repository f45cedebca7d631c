"""`python -m tensorpar.translators smdistributed-to-hf`, on files as smdistributed left them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tensorpar.translators import hf_to_smdistributed
from tensorpar.translators.__main__ import main
from tensorpar.translators.gpt2 import translate_hf_state_dict_to_smdistributed_gpt2
from tests.families import CASES, FAMILIES

HALVES = {"query": 0, "key": 0, "value": 0, "dense1": 0, "dense2": 1, "attention.dense": 1}


@pytest.fixture(scope="module")
def config():
    return FAMILIES[0].config(heads=4, inner=84)


@pytest.fixture(scope="module")
def hf(config):
    return FAMILIES[0].state_dict(config)


@pytest.fixture(scope="module")
def smd(hf):
    return translate_hf_state_dict_to_smdistributed_gpt2(hf)


def half(key: str, tensor: torch.Tensor, tp: int) -> torch.Tensor | None:
    """What one of two tensor-parallel ranks holds."""
    kind = next((kind for kind in HALVES if f"{kind}." in key), None)
    if kind in ("dense2", "attention.dense") and key.endswith("bias"):
        return tensor if tp == 0 else None
    return tensor if kind is None else tensor.chunk(2, HALVES[kind])[tp].clone()


def save_partial(folder: Path, smd, *, stem: str = "model", suffix: str = ".pt") -> None:
    """Two pipeline stages of a layer each, tied weights on both, times two tp ranks."""
    folder.mkdir()
    for pp in range(2):
        for tp in range(2):
            other = f".seq_layers.{1 - pp}."
            part = {k: half(k, v, tp) for k, v in smd.items() if other not in k}
            part = {k: v for k, v in part.items() if v is not None}
            part |= {"_smp_is_partial": True, "_smp_load_info": {"pp": pp}}
            torch.save(part, folder / f"{stem}_{pp}_{tp}{suffix}")
    (folder / "optimizer_0_0.pt").write_bytes(b"not read")


def run(*arguments: object) -> None:
    main(["smdistributed-to-hf", *map(str, arguments)])


def assert_written(file: Path, hf) -> None:
    written = load_file(file)
    assert written.keys() == hf.keys()
    assert all(torch.equal(written[key], hf[key]) for key in hf)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("suffix", [".pt", ""])
def test_a_folder_of_partial_files(tmp_path, smd, hf, config, suffix):
    """Merged, translated, and read by Transformers."""
    save_partial(tmp_path / "in", smd, suffix=suffix)
    run(tmp_path / "in", tmp_path / "out")
    assert_written(tmp_path / "out" / "model.safetensors", hf)
    config.save_pretrained(tmp_path / "out")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, hf[key]) for key, tensor in model.state_dict().items())


def test_partial_files_by_name(tmp_path, smd, hf):
    """Any stem, in any order, to a file of any name."""
    save_partial(tmp_path / "in", smd, stem="step_3")
    files = sorted((tmp_path / "in").glob("step_3_*"), reverse=True)
    run(*files, tmp_path / "out" / "gpt2.safetensors", "--family", "gpt2")
    assert_written(tmp_path / "out" / "gpt2.safetensors", hf)


def test_a_full_file_as_a_program(tmp_path, smd, hf):
    """Tied tensors that share memory too; a line is printed."""
    smd = {**smd, "lm_head.weight": smd["word_embedding.weight"]}
    torch.save(smd, tmp_path / "full.pt")
    command = [sys.executable, "-m", "tensorpar.translators", "smdistributed-to-hf"]
    done = subprocess.run(
        [*command, tmp_path / "full.pt", tmp_path / "out"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpt2: tensor-parallel degree 1")
    assert_written(tmp_path / "out" / "model.safetensors", hf)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
@pytest.mark.parametrize("variant", [0, -1])
def test_the_family_is_recognised(tmp_path, capsys, case, variant):
    """By the keys of a full file of any family."""
    config = case.config(**case.variants[variant])
    hf = case.state_dict(config)
    torch.save(hf_to_smdistributed(hf, config), tmp_path / "full.pt")
    run(tmp_path / "full.pt", tmp_path / "out")
    assert capsys.readouterr().out.startswith(f"{case.model_type}: tensor-parallel degree 1")
    assert_written(tmp_path / "out" / "model.safetensors", hf)


def test_a_family_that_cannot_be_told_is_named(tmp_path, capsys):
    """Base models of BERT and RoBERTa have the same keys."""
    config = CASES["roberta"].config()
    hf = CASES["roberta"].state_dict(config, model="RobertaModel")
    torch.save(hf_to_smdistributed(hf, config), tmp_path / "full.pt")
    told = refused(capsys, tmp_path / "full.pt", tmp_path / "out")
    assert "the keys fit ['bert', 'roberta'], required: one family; name it by --family" in told
    run(tmp_path / "full.pt", tmp_path / "out", "--family", "roberta")
    assert_written(tmp_path / "out" / "model.safetensors", hf)


def refused(capsys, *arguments: object) -> str:
    """The one-line error that ends the program."""
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert str(end.value.code).startswith("error: ")
    assert not capsys.readouterr().out
    return str(end.value.code)


def test_an_existing_file_is_kept(tmp_path, smd, capsys):
    """Refused before anything is read."""
    (tmp_path / "model.safetensors").write_text("mine")
    assert "exists" in refused(capsys, tmp_path / "absent", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (lambda folder: (folder / "model_1_0.pt").unlink(), "no file for pp 1, tp 0"),
        (lambda folder: (folder / "model_1_0.pt").write_bytes(b""), "model_1_0.pt cannot be read"),
        (
            lambda folder: [(folder / f"model_1_{tp}.pt").unlink() for tp in range(2)],
            "the keys fit no family, least badly gpt2",
        ),
        (
            lambda folder: torch.save({"x": Path("/")}, folder / "model_0_1.pt"),
            "model_0_1.pt holds more than tensors and is not read",
        ),
        (lambda folder: torch.save({"model": {}}, folder / "model_0_0.pt"), "model is a dict"),
        (
            lambda folder: torch.save(
                torch.load(folder / "model_1_1.pt") | {"word_embedding.weight": torch.ones(2)},
                folder / "model_1_1.pt",
            ),
            "word_embedding.weight differs between pipeline ranks",
        ),
        (lambda folder: [path.unlink() for path in folder.glob("*_*")], "required: files model_"),
    ],
    ids=["missing", "truncated", "stage", "pickle", "nested", "tie", "empty"],
)
def test_what_is_not_one_checkpoint_is_refused(tmp_path, smd, capsys, breaking, message):
    """One line names it, and nothing is written."""
    save_partial(tmp_path / "in", smd)
    breaking(tmp_path / "in")
    assert message in refused(capsys, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_files_are_refused(tmp_path, hf, capsys):
    """Absent, of several checkpoints, twice, of another layout."""
    a, b, full = (tmp_path / name for name in ("a_0_0.pt", "b_0_1.pt", "full.pt"))
    for file in (a, b, full):
        torch.save(hf, file)
    out = tmp_path / "out"
    assert "absent" in refused(capsys, tmp_path / "nowhere", out)
    assert "files of several checkpoints: ['a', 'b']" in refused(capsys, a, b, out)
    assert "several files for pp 0, tp 0" in refused(capsys, a, a, out)
    assert "named otherwise" in refused(capsys, a, full, out)
    assert "the keys fit no family" in refused(capsys, a, out)
    assert "smdistributed's layout" in refused(capsys, a, out, "--family", "gpt2")
