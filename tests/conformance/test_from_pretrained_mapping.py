"""Weights that stay views of the mapped file: which, and that neither changes the other."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers

import tensorpar
from tensorpar.parameters import local
from tests.conformance.pretrained import stored

#: of which a rank has columns or rows of several blocks in the file; the rest is one piece of it.
COPIED = {
    "gptj": ("attn.out_proj.weight", "mlp.fc_out.weight"),
    "gpt2": (
        "attn.c_attn.weight",
        "attn.c_attn.bias",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    ),
}
HEADS = {"gptj": "GPTJForCausalLM", "gpt2": "GPT2LMHeadModel"}


def loaded(folder: str, **options: Any) -> torch.nn.Module:
    with tensorpar.tensor_parallelism():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, **{"dtype": "auto", **options}
        )


def copied(model: torch.nn.Module, folder: str) -> list[str]:
    """The names of parameters whose memory is not that of the folder's file."""
    told = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [line[0].split("-") for line in told if line[-1] == f"{folder}/model.safetensors"]
    ranges = [range(*(int(end, 16) for end in place)) for place in places]
    return [
        name
        for name, parameter in model.named_parameters()
        if not any(local(parameter).data_ptr() in where for where in ranges)
    ]


def own_values(model: torch.nn.Module) -> list[torch.Tensor]:
    return [local(parameter).detach().clone() for parameter in model.parameters()]


def digest(folder: str) -> str:
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def uses(folder: str) -> dict[str, Any]:
    """What is mapped in which way of loading, and what becomes of file and model."""
    found: dict[str, Any] = {
        "read": len(copied(loaded(folder, disable_mmap=True), folder)),
        "another dtype": len(copied(loaded(folder, dtype=torch.float32), folder)),
    }
    model, other = loaded(folder), loaded(folder)
    found["copied"], found["all"] = copied(model, folder), len(list(model.parameters()))
    before, untouched = digest(folder), own_values(other)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    found["the file is as it was"] = digest(folder) == before
    found["so is another model"] = all(map(torch.equal, own_values(other), untouched))
    trained = own_values(model)
    model.save_pretrained(folder)
    found["the file is another"] = digest(folder) != before
    found["the model is as trained"] = all(map(torch.equal, own_values(model), trained))
    found["so is what was saved"] = all(map(torch.equal, own_values(loaded(folder)), trained))
    found["the other outlives its file"] = all(map(torch.equal, own_values(other), untouched))
    return found


def test_what_the_file_has_in_one_piece_is_mapped(ranks, tmp_path):
    """Other parts are copies; training and saving over the file change no mapped weight."""
    for family, head in HEADS.items():
        folder = str(stored(family, head, tmp_path / family))
        for found in ranks(2).run(uses, folder):
            number = found.pop("all")
            assert found.pop("read") == found.pop("another dtype") == number
            names = found.pop("copied")
            assert names
            assert all(name.endswith(COPIED[family]) for name in names)
            assert len(names) == 2 * len(COPIED[family])  # two layers
            assert found == dict.fromkeys(found, True)


def from_any_file(folder: str) -> tuple[int, list[torch.Tensor]]:
    """How many weights are mapped, and all values."""
    model = loaded(folder)
    values = own_values(model)
    return len(values) - len(copied(model, folder)), values


def test_tensors_that_begin_anywhere(ranks, tmp_path):
    """Where the file's header has an odd length no number begins where its dtype may: copies."""
    folder = stored("gptj", HEADS["gptj"], tmp_path)
    path = folder / "model.safetensors"
    aligned = ranks(2).run(from_any_file, str(folder))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes((end - 7).to_bytes(8, "little") + content[8:end] + b" " + content[end:])
    for (mapped, expected), (still, values) in zip(
        aligned, ranks(2).run(from_any_file, str(folder)), strict=True
    ):
        assert mapped > still == 0
        assert all(map(torch.equal, values, expected))
