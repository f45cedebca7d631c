"""What a checkpoint is, in lines for people; no value is read."""

from __future__ import annotations

from collections.abc import Iterator

from tensorpar.files.safetensors_header import TensorSpec

from .checkpoint import Checkpoint


def description(checkpoint: Checkpoint) -> Iterator[str]:
    """The layout, the degree and every tensor: name, dtype, shape, how it is cut, bytes."""
    degree = len(checkpoint.ranks)
    yield f"path       {checkpoint.path}"
    yield f"layout     {checkpoint.layout}{' (partial files)' if checkpoint.partial else ''}"
    yield f"family     {checkpoint.family or 'unknown'}"
    yield f"degree     {degree}"
    keys = list(dict.fromkeys(key for rank in checkpoint.ranks for key in rank))
    rows = [_row(checkpoint, key) for key in keys]
    stored = {
        id(copy): copy.spec.num_bytes
        for rank in checkpoint.ranks
        for copies in rank.values()
        for copy in copies
    }
    yield f"tensors    {len(keys)}"
    yield f"bytes      {sum(stored.values()):,}"
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _row(checkpoint: Checkpoint, key: str) -> tuple[str, str, str, str]:
    specs = [rank[key][0].spec for rank in checkpoint.ranks if key in rank]
    size = sum(spec.num_bytes for spec in specs)
    dtype = str(specs[0].dtype).removeprefix("torch.")
    return key, dtype, f"{size:,} B", _shape(checkpoint, key, specs)


def _shape(checkpoint: Checkpoint, key: str, specs: list[TensorSpec]) -> str:
    """The whole shape and each rank's slice, where they are known, or what the files hold."""
    if checkpoint.headers:
        header = checkpoint.headers[0]
        kept = header.ties.get(key, key)
        part = header.slices[kept]
        cut = "on every rank"
        if part.dim is not None:
            sizes = [h.slices[kept].stop - h.slices[kept].start for h in checkpoint.headers]
            cut = f"dim {part.dim} cut into {sizes}"
        return f"{list(part.shape)} {cut}" + (f" (tied to {kept})" if kept != key else "")
    shapes = list(dict.fromkeys(spec.shape for spec in specs))
    return " or ".join(str(list(shape)) for shape in shapes)
