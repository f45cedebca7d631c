"""The program `tensorpar`, on files as smdistributed, Transformers and tensorpar left them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tensorpar.translators import from_hf, hf_to_smdistributed, split
from tensorpar.translators.command import main
from tensorpar.translators.gpt2 import translate_hf_state_dict_to_smdistributed_gpt2
from tests.families import CASES, FAMILIES
from tests.unit.test_translators_partial import partial

HALVES = {"query": 0, "key": 0, "value": 0, "dense1": 0, "dense2": 1, "attention.dense": 1}
every_family = pytest.mark.parametrize("family", CASES)


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
    folder.mkdir(exist_ok=True)
    for pp in range(2):
        for tp in range(2):
            other = f".seq_layers.{1 - pp}."
            part = {k: half(k, v, tp) for k, v in smd.items() if other not in k}
            part = {k: v for k, v in part.items() if v is not None}
            part |= {"_smp_is_partial": True, "_smp_load_info": {"pp": pp}}
            torch.save(part, folder / f"{stem}_{pp}_{tp}{suffix}")
    (folder / "optimizer_0_0.pt").write_bytes(b"not read")


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def to_hf(src: Path, dst: Path, *options: object) -> None:
    run("translate", src, dst, "--to", "hf", "--verify", *options)


def saved_model(family: str, folder: Path):
    """A model of Transformers' with random values, saved by it."""
    case = CASES[family]
    config = case.config(**case.variants[-1])
    model = getattr(transformers, case.model)(config)
    model.load_state_dict(case.state_dict(config))
    model.save_pretrained(folder)
    return model


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def assert_written(folder: Path, hf, *, tied: str = "lm_head.weight") -> None:
    """All tensors, the tied one once, and nothing else beside a config."""
    assert same(load_file(folder / "model.safetensors"), {k: hf[k] for k in hf if k != tied})
    assert {path.name for path in folder.iterdir()} <= {"model.safetensors", "config.json"}


@pytest.mark.parametrize("suffix", [".pt", ""])
def test_a_folder_of_partial_files(tmp_path, smd, hf, config, suffix):
    """Merged, translated, and read by Transformers."""
    save_partial(tmp_path / "in", smd, suffix=suffix)
    config.save_pretrained(tmp_path / "in")
    to_hf(tmp_path / "in", tmp_path / "out")
    assert_written(tmp_path / "out", hf)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert same(model.state_dict(), hf)


def test_partial_files_by_name(tmp_path, smd, hf, config):
    """What their names begin with, of several checkpoints in a folder; a config from elsewhere."""
    save_partial(tmp_path / "in", smd, stem="step_3")
    save_partial(tmp_path / "in", smd, stem="step_4")
    config.save_pretrained(tmp_path / "config")
    to_hf(tmp_path / "in" / "step_3", tmp_path / "out", "--config", tmp_path / "config")
    assert_written(tmp_path / "out", hf)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_full_file_as_a_program(tmp_path, smd, hf):
    """Tied tensors that share memory too; a line is printed, and a progress bar with a rate."""
    smd = {**smd, "lm_head.weight": smd["word_embedding.weight"]}
    torch.save(smd, tmp_path / "full.pt")
    command = [sys.executable, "-m", "tensorpar.translators", "translate", "--to", "hf"]
    done = subprocess.run(
        [*command, tmp_path / "full.pt", tmp_path / "out"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gpt2: smdistributed of degree 1 to hf of degree 1, 28 tensors")
    assert "B/s]" in done.stderr
    assert_written(tmp_path / "out", hf)


def test_a_head_of_its_own_is_kept(tmp_path, smd, hf):
    """An smdistributed head with other values than the embedding is no tied one."""
    torch.save({**smd, "lm_head.weight": smd["lm_head.weight"] + 1}, tmp_path / "full.pt")
    to_hf(tmp_path / "full.pt", tmp_path / "out")
    assert_written(tmp_path / "out", {**hf, "lm_head.weight": hf["lm_head.weight"] + 1}, tied="")


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
@pytest.mark.parametrize("variant", [0, -1])
def test_the_family_is_recognised(tmp_path, capsys, case, variant):
    """By the keys of a full file of any family."""
    config = case.config(**case.variants[variant])
    hf = case.state_dict(config)
    torch.save(hf_to_smdistributed(hf, config), tmp_path / "full.pt")
    to_hf(tmp_path / "full.pt", tmp_path / "out")
    assert capsys.readouterr().out.startswith(f"{case.model_type}: smdistributed of degree 1")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, hf[key]) for key, tensor in written.items())
    missing = hf.keys() - written.keys()
    assert all(any(hf[key] is hf[other] for other in written) for key in missing)


def test_a_family_that_cannot_be_told_is_named(tmp_path, capsys):
    """Base models of BERT and RoBERTa have the same keys."""
    config = CASES["roberta"].config()
    hf = CASES["roberta"].state_dict(config, model="RobertaModel")
    torch.save(hf_to_smdistributed(hf, config), tmp_path / "full.pt")
    told = refused(capsys, tmp_path / "full.pt", tmp_path / "out", "--to", "hf")
    assert "the keys fit ['bert', 'roberta'], required: one family; name it by --family" in told
    to_hf(tmp_path / "full.pt", tmp_path / "out", "--family", "roberta")
    assert_written(tmp_path / "out", hf, tied="")


@every_family
@pytest.mark.feature("translators")
def test_there_and_back_are_the_same_bytes(tmp_path, family):
    """Every layout and other degrees between; the file Transformers wrote comes out again."""
    model = saved_model(family, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    steps = [("tensorpar", 4), ("tensorpar", 3), ("smdistributed", 3), ("tensorpar", 8), ("hf", 0)]
    source = tmp_path / "hf"
    for number, (layout, degree) in enumerate(steps):
        out = tmp_path / str(number)
        tp = ["--tp", degree] if degree else []
        run("translate", source, out, "--to", layout, *tp, "--verify")
        source = out
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (source / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert same(type(model).from_pretrained(source).state_dict(), model.state_dict())


@every_family
def test_the_files_of_every_rank(tmp_path, family):
    """Sharded files hold what `split` tells; partial files what is cut by hand."""
    model = saved_model(family, tmp_path / "hf")
    hf, config = load_file(tmp_path / "hf" / "model.safetensors"), model.config
    run("translate", tmp_path / "hf", tmp_path / "tp", "--to", "tensorpar", "--tp", 4)
    for rank, part in enumerate(split(from_hf(hf, config), config, 4)):
        assert same(load_file(tmp_path / "tp" / f"tensorpar-0000{rank}-of-00004.safetensors"), part)
    # by-hand cuts are of heads of size two
    case = CASES[family]
    config = case.config(heads=3, head_size=2, inner=7, **case.variants[-1])
    hf = case.state_dict(config)
    getattr(transformers, case.model)(config).save_pretrained(
        tmp_path / "small", state_dict=dict(hf)
    )
    run("translate", tmp_path / "small", tmp_path / "smd", "--to", "smdistributed", "--tp", 4)
    for rank, part in enumerate(partial(hf_to_smdistributed(hf, config), 4)):
        file = tmp_path / "smd" / f"model_0_{rank}.pt"
        written = torch.load(file, weights_only=True)
        assert written.pop("_smp_is_partial") is True
        tensors = {key: value for key, value in part.items() if isinstance(value, torch.Tensor)}
        # what Transformers ties and stores once is written under the names that were stored
        assert same(written, {key: tensors[key] for key in written})
        assert all(key.startswith(("cls.", "lm_head.")) for key in tensors.keys() - written.keys())
        assert zipfile.ZipFile(file).testzip() is None


def test_dtypes_sizes_and_indices(tmp_path):
    """bfloat16 in several files, which Transformers reads; the config tells the dtype."""
    model = saved_model("gpt2", tmp_path / "hf")
    options = ["--dtype", "bfloat16", "--max-shard-size", "30KB", "--verify"]
    run("translate", tmp_path / "hf", tmp_path / "out", "--to", "hf", *options)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert max(file.stat().st_size for file in files) < 34_000
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    wanted = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    assert same(loaded.state_dict(), wanted)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    run("translate", tmp_path / "out", tmp_path / "tp", "--to", "tensorpar", "--tp", 2)
    run("verify", tmp_path / "out", tmp_path / "tp")


def refused(capsys, *arguments: object) -> str:
    """The one-line error that ends the program."""
    assert main(["translate", *map(str, arguments)]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert told.err.splitlines()[-1].startswith("error: ")
    return told.err


def test_an_existing_folder_is_kept(tmp_path, hf, smd, capsys):
    """Refused before anything is written."""
    torch.save(smd, tmp_path / "full.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    assert "exists" in refused(capsys, tmp_path / "full.pt", tmp_path / "out", "--to", "hf")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"full.pt", "out"}


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
        (
            lambda folder: torch.save(
                torch.load(folder / "model_1_1.pt") | {"word_embedding.weight": torch.ones(97, 32)},
                folder / "model_1_1.pt",
            ),
            "transformer.wte.weight differs between ranks",
        ),
        (
            lambda folder: torch.save(
                torch.load(folder / "model_0_0.pt"), folder / "model_0_0_0.pt"
            ),
            "",
        ),
        (lambda folder: [path.unlink() for path in folder.glob("*_*")], "holds no checkpoint"),
    ],
    ids=["missing", "truncated", "stage", "pickle", "nested", "tie", "values", "other", "empty"],
)
def test_what_is_not_one_checkpoint_is_refused(tmp_path, smd, capsys, breaking, message):
    """One line names it, and nothing is written."""
    save_partial(tmp_path / "in", smd)
    breaking(tmp_path / "in")
    if not message:  # files of another checkpoint beside are none of ours
        return to_hf(tmp_path / "in", tmp_path / "out")
    assert message in refused(capsys, tmp_path / "in", tmp_path / "out", "--to", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    return None


def test_wrong_requests_are_refused(tmp_path, hf, smd, capsys):
    """Absent files, several checkpoints, no config where heads are cut, degrees that are none."""
    (tmp_path / "two").mkdir()
    for stem in ("a", "b"):
        save_partial(tmp_path / "two", smd, stem=stem)
    torch.save(smd, tmp_path / "full.pt")
    torch.save({"x": torch.ones(2)}, tmp_path / "other.pt")
    full, out = tmp_path / "full.pt", tmp_path / "out"
    assert "is absent" in refused(capsys, tmp_path / "nowhere", out, "--to", "hf")
    assert "several checkpoints, ['a', 'b', 'opt" in refused(
        capsys, tmp_path / "two", out, "--to", "hf"
    )
    assert "for the number of heads; name it by --config" in refused(
        capsys, full, out, "--to", "tensorpar"
    )
    assert "of no known family" in refused(
        capsys, tmp_path / "other.pt", out, "--to", "smdistributed"
    )
    assert "--tp 2 with --to hf" in refused(capsys, full, out, "--to", "hf", "--tp", 2)
    assert "tp_degree = 0" in refused(capsys, full, out, "--to", "smdistributed", "--tp", 0)
    assert "size = 'much'" in refused(capsys, full, out, "--to", "hf", "--max-shard-size", "much")
    assert not out.exists()
