"""`from_pretrained` under tensor parallelism from files of every kind: all that users may pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conformance.pretrained import (
    change_config,
    load,
    require_same,
    rewritten,
    stored,
    tensors_in,
)


@dataclass(frozen=True)
class Way:
    """One way of loading GPT-2 or BERT.

    Attributes:
        head: the class that is loaded.
        options: of `from_pretrained`.
        change: what is done to the stored folder; may return another one to load.
        stored: the class whose model is stored; its family by its first letter.
        whole: whether the rank may read everything.
    """

    head: str = "GPT2LMHeadModel"
    options: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Path], Any] = lambda _: None
    stored: str = "GPT2LMHeadModel"
    whole: bool = False


def in_subfolder(folder: Path) -> None:
    (folder / "deep").mkdir()
    for path in list(folder.glob("*.*")):
        path.rename(folder / "deep" / path.name)


def as_variant(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.half.safetensors")


def as_pickle(folder: Path) -> None:
    tensors = tensors_in(folder)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # as old files have it
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_two_pickles(folder: Path) -> None:
    tensors = tensors_in(folder)
    weight_map = {}
    for place, name in enumerate(tensors):
        file = f"pytorch_model-0000{place % 2 + 1}-of-00002.bin"
        weight_map[name] = file
    for file in set(weight_map.values()):
        torch.save({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def renamed(*pairs: tuple[str, str]) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        out = {}
        for name, x in tensors.items():
            for old, new in pairs:
                name = name.replace(old, new)
            out[name] = x
        return out

    return lambda folder: rewritten(folder, change)


def with_more(**more: Callable[[dict[str, Any]], torch.Tensor]) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return tensors | {name.replace("__", "."): make(tensors) for name, make in more.items()}

    return lambda folder: rewritten(folder, change)


def without(*names: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {n: x for n, x in tensors.items() if not any(part in n for part in names)}

    return lambda folder: rewritten(folder, change)


def in_hub_cache(folder: Path) -> dict[str, Any]:
    """A cache as the hub's client keeps it, with two revisions of which one is asked for."""
    repo = folder / "cache" / "models--someone--tiny"
    for revision, commit in (("main", "0" * 40), ("old", "1" * 40)):
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
        for path in folder.glob("*.*"):
            if path.is_file() and (revision == "old" or path.suffix == ".json"):
                shutil.copy(path, snapshot)
    options = {"cache_dir": str(folder / "cache"), "local_files_only": True, "revision": "old"}
    return {"folder": "someone/tiny", **options}


GPT2 = transformers.GPT2Config
WAYS = {
    "float32": Way(options={"dtype": torch.float32}),
    "bfloat16 by name": Way(options={"dtype": "bfloat16"}),
    "the old name of dtype": Way(options={"torch_dtype": torch.float16}),
    "dtype of the config": Way(change=lambda folder: change_config(folder, dtype="float32")),
    "subfolder": Way(options={"subfolder": "deep"}, change=in_subfolder),
    "variant": Way(options={"variant": "half"}, change=as_variant),
    "hub cache": Way(change=in_hub_cache),
    "pickle": Way(change=as_pickle),
    "two pickles": Way(change=as_two_pickles),
    "automatic class": Way("AutoModelForCausalLM"),
    "automatic base class": Way("AutoModel"),
    "labels": Way("GPT2ForTokenClassification", {"num_labels": 5}, stored="GPT2Model"),
    "other labels": Way(
        "GPT2ForTokenClassification",
        {"num_labels": 5, "ignore_mismatched_sizes": True},
        stored="GPT2ForTokenClassification",
    ),
    "another vocabulary": Way(options={"vocab_size": 50, "ignore_mismatched_sizes": True}),
    "a config of one's own": Way(options={"own_config": {"attn_pdrop": 0.5}}),
    "eager": Way(options={"attn_implementation": "eager"}),
    "key mapping": Way(
        options={"key_mapping": {r"^body\.": "transformer."}},
        change=renamed(("transformer.", "body.")),
    ),
    "old buffers": Way(
        change=with_more(
            transformer__h__0__attn__bias=lambda _: torch.ones(1, 1, 16, 16),
            transformer__h__0__attn__masked_bias=lambda _: torch.tensor(-1e4),
        )
    ),
    "unknown keys": Way(change=with_more(mystery__weight=lambda _: torch.ones(3))),
    "a layer lacks": Way(change=without("h.1.mlp", "h.0.attn.c_attn", "wpe")),
    "no embedding": Way(change=without("wte")),
    "only the tied head": Way(change=renamed(("transformer.wte", "lm_head"))),
    "a tie stored twice": Way(
        change=with_more(lm_head__weight=lambda tensors: tensors["transformer.wte.weight"]),
        whole=True,
    ),
    "a tie stored twice, unequal": Way(
        change=with_more(lm_head__weight=lambda tensors: tensors["transformer.wte.weight"] + 1),
        whole=True,
    ),
    "delayed": Way(
        "GPT2ForSequenceClassification",
        {"context": {"delayed_parameter_initialization": True}},
        stored="GPT2Model",
    ),
    "names of old": Way(
        "BertForMaskedLM",
        change=renamed(
            ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
        ),
        stored="BertForMaskedLM",
    ),
    "a prefix too few": Way(
        "BertForMaskedLM", change=renamed(("bert.", "")), stored="BertForMaskedLM"
    ),
    "weights in memory": Way(options={"state_dict": {}}, whole=True),
    "switched off": Way(options={"context": {"enabled": False}}, whole=True),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_loading(ranks, tmp_path, name, size):
    """Files, types, names and gaps of every kind: values and report are Transformers' own."""
    way = WAYS[name]
    family = {"G": "gpt2", "B": "bert"}[way.stored[0]]
    options = {**way.options, **(way.change(stored(family, way.stored, tmp_path)) or {})}
    folder: str | None = options.pop("folder", str(tmp_path))
    if changes := options.pop("own_config", None):
        options["config"] = GPT2.from_pretrained(folder, **changes)
    if "state_dict" in options:
        options |= {"state_dict": tensors_in(tmp_path), "config": GPT2.from_pretrained(tmp_path)}
        folder = None
    theirs = load(way.head, folder, {**options, "context": {}}, False)
    for ours in ranks(size).run(load, way.head, folder, options, True):
        require_same(ours, theirs)
        if not way.whole:
            stored_as = 8 / min(dtype.itemsize for dtype in ours.facts["dtypes"].values())
            assert 0 < ours.num_bytes <= stored_as * (ours.needed + ours.slack)
