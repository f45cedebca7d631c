"""Models loaded by Transformers in one process and on ranks, and what is compared of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import tensorpar
from tensorpar.files.reading import counting
from tests.conformance.families import build
from tests.conformance.gpt2 import Tensors, detached, weights_of


@dataclass(frozen=True)
class Loaded:
    """What is known of a model after loading.

    Attributes:
        weights: parameters and persistent buffers in Hugging Face's layout.
        facts: what loading reported, logged and left behind.
        num_bytes: read of the checkpoint by this rank.
        needed: the size of this rank's parts, as they are stored.
        slack: what a few values of each tensor take, by which ranks compare their files.
    """

    weights: Tensors
    facts: dict[str, Any]
    num_bytes: int = 0
    needed: int = 0
    slack: int = 0


@contextmanager
def logged() -> Iterator[list[str]]:
    """Within: what Transformers says of loading is collected."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def load(head: str, folder: str | None, options: Mapping[str, Any], parallel: bool) -> Loaded:
    """A model from a folder, by Transformers alone or under tensor parallelism."""
    torch.manual_seed(3)
    context = options.get("context", {})
    given = {name: value for name, value in options.items() if name != "context"}
    within = tensorpar.tensor_parallelism(**context) if parallel else nullcontext()
    with counting() as count, logged() as said, within:
        model, info = getattr(transformers, head).from_pretrained(
            folder, output_loading_info=True, **given
        )
    kinds = {isinstance(parameter, DTensor) for parameter in model.parameters()}
    assert kinds == {parallel and context.get("enabled", True)}
    names = dict(model.state_dict(keep_vars=True))
    shares = [[other for other, y in names.items() if y is x] for x in names.values()]
    facts = {
        "class": type(model).__name__,
        "info": {name: sorted(map(str, value)) for name, value in info.items()},
        # rows stand in the order of a set
        "log": sorted(line for message in said for line in message.splitlines()),
        "training": model.training,
        "ties": sorted(names for names in shares if len(names) > 1),
        "dtypes": {name: x.dtype for name, x in names.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "next random numbers": torch.rand(2).tolist(),
        "config": model.config.to_diff_dict(),
        "generation": model.generation_config.to_dict() if model.can_generate() else None,
        "path": model.name_or_path,
    }
    parts = [p.to_local() if parallel and isinstance(p, DTensor) else p for p in model.parameters()]
    return Loaded(
        detached(weights_of(model), ""),
        facts,
        count.num_bytes,
        sum(part.nbytes for part in parts),
        sum(8 * part.element_size() for part in parts),
    )


def require_same(ours: Loaded, theirs: Loaded) -> None:
    """Reports are equal and weights are bit for bit."""
    assert ours.facts == theirs.facts
    assert ours.weights.keys() == theirs.weights.keys()
    unequal = [name for name, x in ours.weights.items() if not torch.equal(x, theirs.weights[name])]
    assert not unequal


def stored(family: str, head: str, folder: Path, **options: Any) -> Path:
    """A folder of Transformers' own with a perturbed float64 model."""
    build(family, head, parallel=False).save_pretrained(folder, **options)
    return folder


def tensors_in(folder: Path) -> Tensors:
    """All tensors of a folder's safetensors files."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def rewritten(folder: Path, change: Any) -> None:
    """A folder's one safetensors file with its tensors changed by a function of a dict."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: x.clone() for name, x in change(tensors).items()}, path, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    """A folder's config with some values changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
