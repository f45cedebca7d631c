"""`tensorpar verify` and `tensorpar inspect`: what two checkpoints, or one, are told to be."""

from __future__ import annotations

import pytest
import torch

from tensorpar.translators import converting
from tensorpar.translators.command import main
from tensorpar.translators.gpt2 import translate_hf_state_dict_to_smdistributed_gpt2
from tests.families import FAMILIES
from tests.unit.test_translators_command import run, save_partial, saved_model


@pytest.fixture(scope="module")
def smd():
    config = FAMILIES[0].config(heads=4, inner=84)
    return translate_hf_state_dict_to_smdistributed_gpt2(FAMILIES[0].state_dict(config))


def test_verify_tells_what_differs(tmp_path, capsys, smd):
    """Bitwise or within a tolerance; between layouts; exit status 1."""
    torch.save(smd, tmp_path / "a.pt")
    key = "transformer.seq_layers.1.output.dense1.bias"
    moved = smd[key] + torch.tensor([0.0] * 83 + [0.25])
    torch.save({**smd, key: moved}, tmp_path / "b.pt")
    arguments = ["verify", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]
    assert main(arguments) == 1
    told = capsys.readouterr().out
    assert "transformer.h.1.mlp.c_fc.bias differs in 1 of 84 values, by at most 0.25" in told
    assert main([*arguments, "--tolerance", "0.3"]) == 0
    assert main([*arguments, "--tolerance", "0.2"]) == 1
    torch.save({k: v.double() for k, v in smd.items()}, tmp_path / "c.pt")
    assert main([*arguments[:2], str(tmp_path / "c.pt")]) == 1
    assert "has dtypes torch.float32 and torch.float64" in capsys.readouterr().out
    assert main([*arguments[:2], str(tmp_path / "c.pt"), "--tolerance", "0"]) == 0


def test_verify_knows_damage_in_our_own_files(tmp_path, capsys):
    """A flipped bit is named, by the file alone."""
    saved_model("gpt2", tmp_path / "hf")
    run("translate", tmp_path / "hf", tmp_path / "tp", "--to", "tensorpar", "--tp", 2)
    run("verify", tmp_path / "tp")
    file = tmp_path / "tp" / "tensorpar-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "tp")]) == 1
    assert f"transformer.wte.weight in {file.name} is damaged" in capsys.readouterr().out


def test_inspect_tells_what_there_is(tmp_path, capsys, smd):
    """Layout, degree, dtypes, global shapes and how they are cut."""
    saved_model("gpt2", tmp_path / "hf")
    run("translate", tmp_path / "hf", tmp_path / "tp", "--to", "tensorpar", "--tp", 3)
    save_partial(tmp_path / "smd", smd)
    capsys.readouterr()
    run("inspect", tmp_path / "tp")
    told = capsys.readouterr().out
    assert "layout     tensorpar" in told
    assert "degree     3" in told
    assert "[3, 5, 8, 40] dim 1 cut into [2, 2, 1]" in told
    run("inspect", tmp_path / "smd")
    told = capsys.readouterr().out
    assert "layout     smdistributed" in told
    assert "family     gpt2" in told
    run("inspect", tmp_path / "hf")
    assert "layout     hf" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["hf", "tensorpar", "smdistributed"])
def test_what_was_written_wrong_is_found_and_deleted(tmp_path, capsys, monkeypatch, layout):
    """`--verify` reads the new files, so it sees a bit that the disk did not keep."""
    saved_model("gpt2", tmp_path / "hf")
    write = converting.write

    def write_wrong(tensors, destination, folder, update):
        write(tensors, destination, folder, update)
        file = next(path for path in sorted(folder.iterdir()) if path.suffix != ".json")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)

    monkeypatch.setattr(converting, "write", write_wrong)
    degree = [] if layout == "hf" else ["--tp", "2"]
    command = ["translate", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", layout, *degree]
    assert main([*command, "--verify"]) == 1
    assert "what was written is not what was read, and is deleted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
