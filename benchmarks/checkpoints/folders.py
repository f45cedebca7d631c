"""Checkpoints made on the spot, and the disk that they lie on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import torch
from tqdm import tqdm

WIDTH, INNER, HEADS, VOCABULARY = 4096, 16384, 16, 50400


def affordable(size: float, folder: Path) -> float:
    """The size, or what the disk has room for: the source and three copies."""
    free = shutil.disk_usage(folder).free
    possible = free / (2e9 * 4.2)
    if size <= possible:
        return size
    smaller = int(possible * 10) / 10
    print(
        f"--size {size} needs {size * 8.4:.0f} GB, {free / 1e9:.0f} GB are free: --size {smaller}"
    )
    return smaller


def make_model(folder: Path, size: float, family: str = "gptj") -> int:
    """A checkpoint of about `size` billions of parameters; the bytes of its largest tensor.

    Written tensor by tensor, since the machine need not hold it.
    """
    import transformers

    from tensorpar.files.positioned import bytes_of
    from tensorpar.files.safetensors_header import TensorSpec, decode, encode

    per_layer = 4 * WIDTH**2 + 2 * WIDTH * INNER
    layers = max(round((size * 1e9 - 2 * VOCABULARY * WIDTH) / per_layer), 1)
    sizes = {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "hidden_size": WIDTH}
    if family == "gptj":
        config = transformers.GPTJConfig(n_inner=INNER, num_attention_heads=HEADS, **sizes)
    else:
        config = transformers.GPTNeoXConfig(
            intermediate_size=INNER, num_attention_heads=HEADS, **sizes
        )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    specs = {
        name: TensorSpec(torch.bfloat16, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    start = encode(specs, {"format": "pt"})
    total = len(start) + sum(spec.num_bytes for spec in specs.values())
    header = decode(start, total)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(start)
        for name in tqdm(header.tensors, desc=f"making {layers} layers"):
            file.seek(header.offsets[name])
            file.write(bytes_of(torch.randn(specs[name].shape, dtype=torch.bfloat16)))
    return max(spec.num_bytes for spec in specs.values())


def settle(out: Path) -> None:
    """Nothing left of the run before, in the folder or on its way to the disk."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync", "-f", out.parent], check=True)


def bring_into_cache(file: Path) -> None:
    """Read a file, so that its pages are there; a machine may drop them within a minute."""
    with file.open("rb", buffering=0) as source:
        while source.read(1 << 24):
            pass


def drop_from_cache(file: Path) -> bool:
    """Let the system forget a file's pages, which nobody may have mapped; whether it has."""
    with file.open("rb") as source:
        os.fsync(source.fileno())
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", file]
    left = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(left) < file.stat().st_size / 100


def file_system(folder: Path) -> str:
    told = subprocess.run(
        ["df", "--output=fstype,source", folder], capture_output=True, text=True, check=True
    )
    return " ".join(told.stdout.splitlines()[1].split())
