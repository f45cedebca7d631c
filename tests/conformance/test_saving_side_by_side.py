"""Who writes what of a saved folder: ranks side by side, or rank 0 alone where they are apart."""

from __future__ import annotations

import errno
import shutil
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tensorpar.files import writing
from tensorpar.saving import file_parts, own_parts, pieces
from tests.conformance.families import CASES as FAMILIES
from tests.conformance.families import build
from tests.conformance.gpt2 import Case, perturbed, refusal
from tests.conformance.test_save_pretrained import SMALL_PIECES, require_same_folders


def apart(*_: Any) -> None:
    """What `make_shared` answers where ranks cannot share memory; rank 0 then writes all."""


class NoFiles:
    """What `io` is where the path that rank 0 tells leads nowhere."""

    @staticmethod
    def FileIO(path: str, _: str) -> Any:  # noqa: N802
        raise FileNotFoundError(path)


#: by arrangement, what `OwnParts.write` answers; it is not asked where no memory can be shared.
TOGETHER = {
    "side by side": {"True"},
    "every stretch alone": {"True"},
    "small pieces, every stretch alone": {"True"},
    "apart": set(),
    "small pieces, apart": set(),
    "rank 1 on another machine": {"False"},
    "rank 1 sees other files": {"False"},
}


def arrange(patch: pytest.MonkeyPatch, arrangement: str) -> None:
    """Let this rank believe what it is told of the others and their files."""
    if "small pieces" in arrangement:
        patch.setattr(pieces, "PIECE_BYTES", SMALL_PIECES)
    if "every stretch alone" in arrangement:
        patch.setattr(file_parts, "LONG", 1)
    if "apart" in arrangement:
        patch.setattr(own_parts, "make_shared", apart)
    if arrangement == "rank 1 on another machine" and dist.get_rank() == 1:
        patch.setattr(own_parts, "attached", lambda _: torch.zeros(8192, dtype=torch.uint8))
    if arrangement == "rank 1 sees other files" and dist.get_rank() == 1:
        patch.setattr(own_parts, "io", NoFiles)


def saves(folder: str) -> dict[str, list[str]]:
    """The language model of every family, saved in every arrangement; who wrote together."""
    write, together = own_parts.OwnParts.write, []

    def noted(*args: Any) -> bool:
        together.append(write(*args))
        return together[-1]

    found: dict[str, list[str]] = {}
    for family in sorted(FAMILIES):
        model = build(family, FAMILIES[family].heads[0], parallel=True)
        for arrangement in TOGETHER:
            together.clear()
            with pytest.MonkeyPatch.context() as patch:
                arrange(patch, arrangement)
                patch.setattr(own_parts.OwnParts, "write", noted)
                model.save_pretrained(f"{folder}/{family}/{arrangement}", max_shard_size="200KB")
            found.setdefault(arrangement, []).extend(map(str, together))
    return found


def test_every_arrangement_writes_the_same(ranks, tmp_path):
    """Byte for byte what Transformers writes, and together only where all see memory and file."""
    for found in ranks(3).run(saves, str(tmp_path)):
        for arrangement, told in found.items():
            assert set(told) == TOGETHER[arrangement], arrangement
    for family in sorted(FAMILIES):
        theirs = tmp_path / "theirs" / family
        build(family, FAMILIES[family].heads[0], parallel=False).save_pretrained(
            theirs, max_shard_size="200KB"
        )
        for arrangement in TOGETHER:
            require_same_folders(tmp_path / family / arrangement, theirs)


def full_at_once(*_: Any) -> None:
    """What a copy does that fails on rank 1."""
    if dist.get_rank() == 1:
        raise OSError(errno.ENOSPC, "No space left on device")


def failing_save(folder: str, file: str, rank: int, together: bool) -> list[str]:
    """What every rank is told when one cannot write; afterwards all can save."""
    model = perturbed(Case(), parallel=True)
    write, num_writes = writing.write_from, 0

    def full(*args: Any) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes > 9 and dist.get_rank() == rank != 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    with pytest.MonkeyPatch.context() as patch:
        if not together:
            patch.setattr(own_parts, "make_shared", apart)
        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(writing, "write_from", full)
            broken.setattr(own_parts, "write_from", full)
            if rank == 1:  # amid what the ranks put together, before all meet
                broken.setattr(pieces, "PIECE_BYTES", SMALL_PIECES)
                broken.setattr(file_parts.Part, "put_into", full_at_once)
            options = {"max_shard_size": "30KB"}
            told = [refusal(lambda: model.save_pretrained(folder, **options), Exception)]
        told.append(refusal(lambda: model.save_pretrained(file), Exception))
        told.append(
            refusal(lambda: model.save_pretrained(folder, max_shard_size="huge"), Exception)
        )
        model.save_pretrained(f"{folder}-again")
    return told


@pytest.mark.parametrize(("rank", "together"), [(0, True), (1, True), (2, True), (0, False)])
def test_a_failure_of_a_writing_rank_is_every_ranks(ranks, tmp_path, rank, together):
    """A full disk, a file in the way, no size: an error on all ranks, and nothing has changed."""
    case = Case(dtype=torch.float32)
    before = tmp_path / "before"
    perturbed(case, parallel=False).save_pretrained(before)
    shutil.copytree(before, tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    folder, file = str(tmp_path / "out"), str(tmp_path / "file")
    told = ranks(3).run(failing_save, folder, file, rank, together)
    for number, lines in enumerate(told):
        assert "No space left on device" in lines[0]
        assert "is a file, required: a folder" in lines[1]
        assert "huge" in lines[2]
        led = [line.startswith("rank 0, which writes, failed") for line in lines]
        assert led == [number > 0] * 3
        assert (f"rank {rank}: " in lines[0]) == (rank > 0)
    require_same_folders(tmp_path / "out", before)
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "out-again" / "model.safetensors").exists()
    left = {"before", "out", "file", "out-again"}
    assert {path.name for path in tmp_path.iterdir()} == left


def largest_allocation(folder: str, together: bool) -> int:
    """The largest tensor that this rank makes while all save, in bytes."""
    model = perturbed(Case(), parallel=True)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not isinstance(result, DTensor):
                fresh = not any(
                    isinstance(x, torch.Tensor)
                    and not x.is_meta
                    and x.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
                    for x in args
                    if isinstance(x, torch.Tensor) and not isinstance(x, DTensor)
                )
                if fresh and not result.is_meta and func is not DTensor.to_local:
                    largest = max(largest, result.nbytes)
            return result

    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(pieces, "PIECE_BYTES", 512)
        if not together:
            patch.setattr(own_parts, "make_shared", apart)
        model.save_pretrained(folder)
    return largest


def test_no_rank_holds_more_than_it_must(ranks, tmp_path):
    """Two shared pieces, here of a page each; where ranks are apart, rank 0 a whole tensor."""
    folder = str(tmp_path / "out")
    assert all(one <= 2 * 4096 for one in ranks(2).run(largest_allocation, folder, True))
    writer, *others = ranks(2).run(largest_allocation, folder, False)
    assert writer == 40 * 120 * 8  # the largest tensor; its memory is used again
    assert all(other <= 512 for other in others)
