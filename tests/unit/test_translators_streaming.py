"""Translation on disk when it is killed, when the disk is full, and what memory it takes."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
import transformers

from tensorpar.files.safetensors_header import TensorSpec
from tensorpar.translators.assembly import Place, Tensor, tensors_of
from tensorpar.translators.checkpoint import opened_checkpoint
from tensorpar.translators.command import main
from tensorpar.translators.converting import Wanted, target_of
from tensorpar.translators.destination import planned
from tensorpar.translators.stored import InMemory, blocks
from tensorpar.translators.stream import NUM_WORKERS, Buffer, slabs, write
from tests.families import CASES
from tests.small_disk import small_disk

MB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny GPT-2 as Transformers saves it."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    model = transformers.GPT2LMHeadModel(CASES["gpt2"].config(layers=1))
    model.save_pretrained(folder)
    return folder


def arguments(source: Path, out: Path, layout: str = "tensorpar") -> list[str]:
    return ["translate", str(source), str(out), "--to", layout, "--tp", "2"]


def signalled(command: list[str], number: int, at: int) -> int:
    """The status of a process that gets a signal at one of its writes, syncs and renames."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    counted = itertools.count()

    def striking(original):
        def struck(*args):
            if next(counted) == at:
                os.kill(os.getpid(), number)
            return original(*args)

        return struck

    for name in ("pwrite", "fsync", "rename"):
        setattr(os, name, striking(getattr(os, name)))
    try:
        os._exit(main(command))
    finally:
        os._exit(3)


def test_killed_at_any_point_leaves_nothing_or_all(source, tmp_path):
    """At every write, sync and rename; the next run clears away what a killed one left."""
    out = tmp_path / "out"
    whole = num_killed = 0
    for at in range(200):
        status = signalled(arguments(source, out), signal.SIGKILL, at)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        num_killed += 1
        if out.exists():
            assert main(["verify", str(source), str(out)]) == 0
            whole += 1
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        else:
            assert len(list(tmp_path.iterdir())) == 1
    assert num_killed > 20
    assert whole == 1  # between the rename and the last sync
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main(["verify", str(source), str(out)]) == 0


def test_ended_politely_leaves_nothing(source, tmp_path):
    """What was written is deleted, and the status is 1."""
    status = signalled(arguments(source, tmp_path / "out"), signal.SIGTERM, 30)
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["tensorpar", "smdistributed", "hf"])
@pytest.mark.parametrize("limit", [100, 3_000, 30_000])
def test_a_full_disk_leaves_nothing(source, tmp_path, capsys, layout, limit):
    """Wherever it is full: an error, and neither a folder nor a file."""
    command = arguments(source, tmp_path / "out", layout)
    with small_disk(limit):
        assert main(command if layout != "hf" else command[:-2]) == 1
    assert "error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def rss_anon() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("RssAnon")) << 10


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_is_a_buffer_for_each_worker(tmp_path, tp):
    """Also where a tensor must pass as a whole, as GPT-2's transposed weights do."""
    config = transformers.GPT2Config(
        n_embd=512, n_inner=16384, n_layer=3, n_head=8, vocab_size=16384, n_positions=8
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    largest = 512 * 16384 * 4
    with opened_checkpoint(tmp_path / "hf") as source:
        target = target_of(source, Wanted("tensorpar", tp))
        tensors = tensors_of(source)
        plan = planned(tensors, target, config=source.config)
        (tmp_path / "out").mkdir()
        base = rss_anon()
        peaks: list[int] = []
        write(tensors, plan, tmp_path / "out", lambda _: peaks.append(rss_anon() - base))
    assert sum(tensor.spec.num_bytes for tensor in tensors) > 6 * largest
    assert max(peaks) < NUM_WORKERS * largest + 40 * MB


def test_slabs_are_rows_that_both_sides_keep_together():
    """A tensor that is only cut passes in slabs; one that is transposed as a whole."""
    rows = 12_000
    whole = torch.arange(rows * 1024, dtype=torch.int32).view(rows, 1024)
    spec = TensorSpec(torch.float32, (rows, 1024))
    row_cut = Place("x", 256, (rows, 256), (1024, 1))
    column_cut = Place("x", 1000 * 1024, (1000, 1024), (1024, 1))
    turned = Place("x", 0, (1024, rows), (1, 1024))
    stored = InMemory(whole.view(torch.float32))
    full = Place("x", 0, (rows, 1024), (1024, 1))
    tensor = Tensor("x", spec, ((stored, full),))
    cuts = slabs(spec, tensor.stored, [row_cut, column_cut])
    assert len(cuts) == 12  # of 4 MB
    assert [row for rows_ in cuts for row in rows_] == list(range(rows))
    assert slabs(spec, tensor.stored, [turned]) == [range(rows)]
    buffer = Buffer()
    for place in (row_cut, column_cut):
        wanted = whole.as_strided(place.shape, place.strides, place.offset).reshape(-1)
        found = torch.zeros_like(wanted)
        for some in cuts:
            slab = buffer.filled(tensor, some)
            part, first = place.within(spec.shape, some)
            values = part.view(slab).reshape(-1)
            found[first : first + values.numel()] = values
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_blocks_cover_any_view_in_order(size):
    """Contiguous or not, blocks follow each other and hold at most what was asked for."""
    base = torch.arange(5 * 6 * 7 * 8).view(5, 6, 7, 8)
    for view in (base, base.permute(3, 1, 0, 2), base[:, 1:4], base[2, :, ::2], base[0, 0, 0, 0]):
        found = list(blocks(view, size))
        assert all(block.numel() <= size for _, block in found)
        assert torch.equal(torch.cat([block.reshape(-1) for _, block in found]), view.reshape(-1))
        ends = itertools.accumulate(block.numel() for _, block in found)
        assert [start for start, _ in found] == [0, *ends][:-1]
