"""Who writes what of a saved folder: ranks side by side, or rank 0 alone where they are apart."""

from __future__ import annotations

import errno
import io
import shutil
from pathlib import Path
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


class OtherFiles:
    """What `io` is where the path leads to a file of another machine, as long as ours."""

    @staticmethod
    def FileIO(path: str, mode: str) -> Any:  # noqa: N802
        other = Path(f"{path}.other")
        other.write_bytes(bytes(Path(path).stat().st_size))
        file = io.FileIO(other, mode)
        other.unlink()
        return file


#: by arrangement, what `OwnParts.write` answers; it is not asked where no memory can be shared.
TOGETHER = {
    "side by side": {"True"},
    "every stretch alone": {"True"},
    "small pieces, every stretch alone": {"True"},
    "apart": set(),
    "small pieces, apart": set(),
    "rank 1 on another machine": {"False"},
    "rank 1 sees no files": {"False"},
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
    if arrangement == "rank 1 sees no files" and dist.get_rank() == 1:
        patch.setattr(own_parts, "io", NoFiles)
    if arrangement == "rank 1 sees other files" and dist.get_rank() == 1:
        patch.setattr(own_parts, "io", OtherFiles)


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


class Late:
    """Rank 1 of two, as late as the barriers of `OwnParts` allow; what was done is told by files.

    Args:
        folder: where ranks tell each other.
        late: in "filling" shared memory, which rank 0 must wait for before it writes; or in
            "writing" it, while rank 0 already fills the other half.
    """

    def __init__(self, folder: str, late: str) -> None:
        self.folder, self.late, self.slab, self.number = Path(folder), late, -1, 0

    def tell(self, step: str) -> None:
        if dist.get_rank() == 0:
            (self.folder / step).touch()

    def await_(self, late: str, step: str) -> None:
        if dist.get_rank() == 1 and late == self.late:
            while not (self.folder / step).exists():
                pass

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        cls, part = own_parts.OwnParts, file_parts.Part
        together, anywhere, put, fill = (
            cls._write_together,
            cls._anywhere,
            cls._put,
            part.put_into,
        )

        def write_together(own: Any, parts: Any, error: Any) -> Any:
            self.number = sum(1 for one in parts for _ in own_parts._slabs(*one))
            return together(own, parts, error)

        def late_fill(own: Any, *args: Any) -> None:
            self.slab += 1
            self.await_("filling", f"went on {self.slab}")
            fill(own, *args)
            self.tell(f"filled {self.slab}")

        def told_anywhere(own: Any, error: Any) -> bool:
            self.tell(f"went on {self.slab}")
            return anywhere(own, error)

        def late_put(own: Any, *args: Any) -> None:
            if 0 <= self.slab < self.number - 1:
                self.await_("writing", f"filled {self.slab + 1}")
            put(own, *args)
            self.tell(f"went on {self.slab}")

        patch.setattr(cls, "_write_together", write_together)
        patch.setattr(cls, "_anywhere", told_anywhere)
        patch.setattr(cls, "_put", late_put)
        patch.setattr(part, "put_into", late_fill)


def saves_late(folder: str, late: str) -> int:
    model = perturbed(Case(), parallel=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 4 * SMALL_PIECES)
        rank = Late(folder, late)
        rank.patch(patch)
        model.save_pretrained(f"{folder}/out")
    return rank.number


@pytest.mark.parametrize("late", ["filling", "writing"])
def test_ranks_wait_for_each_other_where_they_must(ranks, tmp_path, late):
    """One that is late has still put its part into every piece before another writes it."""
    perturbed(Case(), parallel=False).save_pretrained(tmp_path / "theirs")
    assert all(number > 9 for number in ranks(2).run(saves_late, str(tmp_path), late))
    require_same_folders(tmp_path / "out", tmp_path / "theirs")


def started(folder: str, together: bool) -> list[tuple[int, int]]:
    """The stretches of a saved file that this rank lets the system bring to the disk."""
    model, found = perturbed(Case(), parallel=True), []
    with pytest.MonkeyPatch.context() as patch:
        for module in (writing, own_parts):
            patch.setattr(module, "start_writing", lambda _, at, length: found.append((at, length)))
        if not together:
            patch.setattr(own_parts, "make_shared", apart)
        model.save_pretrained(folder)
    return found


@pytest.mark.parametrize("together", [True, False])
def test_writing_to_the_disk_begins_with_every_piece(ranks, tmp_path, together):
    """All bytes of the file are begun once, whoever writes them; the end has little to wait for."""
    of_ranks = ranks(2).run(started, str(tmp_path / "out"), together)
    found = sorted(stretch for of_rank in of_ranks for stretch in of_rank)
    ends = [0, *(at + length for at, length in found)]
    assert ends == [*(at for at, _ in found), (tmp_path / "out/model.safetensors").stat().st_size]
