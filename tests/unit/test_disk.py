"""What the operating system is asked for files: room, and to begin writing."""

from __future__ import annotations

import ctypes
import errno
import json

import pytest
import torch

from tensorpar.files import disk, shared_memory
from tests.small_disk import small_disk
from tests.tiny_tmpfs import run_in

FULL = """
import errno, json, os, sys
from pathlib import Path
import torch
from tensorpar.files import disk, positioned, shared_memory, writing
from tensorpar.promise import Promise

told, folder = {}, Path(sys.argv[1])

def refusal(call):
    try:
        return repr(call())
    except OSError as error:
        return errno.errorcode[error.errno]

with open(folder / "file", "wb") as file:
    told["reserve"] = refusal(lambda: disk.reserve(file.fileno(), 1 << 20))
    told["length"] = file.seek(0, os.SEEK_END)
    told["fits"] = refusal(lambda: disk.reserve(file.fileno(), 1 << 14))
    memory = memoryview(bytes(1 << 20))
    told["write"] = refusal(lambda: positioned.write_from(file.fileno(), memory, 0))
(folder / "file").unlink()
values = Promise.of(lambda: torch.zeros(1 << 20), (1 << 20,), torch.float32)
told["weights"] = refusal(lambda: writing.write_weights({"w": values}, folder / "w"))
(folder / "w").unlink()
shared_memory._FOLDER = folder
told["shared"] = refusal(lambda: shared_memory.make_shared(1 << 20, b"nonce"))
told["left"] = os.listdir(folder)
print(json.dumps(told))
"""


def test_a_disk_that_is_full(tmp_path, record_property):
    """ENOSPC of a real file system comes as OSError, from reserving as from writing.

    Memory that finds no room there is not made, and nothing of it is left.
    """
    output = run_in(tmp_path, "64k", FULL, str(tmp_path))
    if output is None:
        record_property("summary", "no full disk: a file system cannot be mounted here")
        return
    assert json.loads(output) == {
        "reserve": "ENOSPC",
        "length": 0,
        "fits": "True",
        "write": "ENOSPC",
        "weights": "ENOSPC",
        "shared": "None",
        "left": [],
    }


def test_reserved_room_is_there_and_empty(tmp_path):
    """A reserved file has its length and blocks, and zeros in them; nothing is reserved of 0."""
    with (tmp_path / "file").open("w+b") as file:
        if disk.reserve(file.fileno(), 1 << 20):
            found = (tmp_path / file.name).stat()
            assert (found.st_size, found.st_blocks * 512 >= 1 << 20) == (1 << 20, True)
            assert file.read() == bytes(1 << 20)
    with (tmp_path / "empty").open("wb") as file:
        assert disk.reserve(file.fileno(), 0)
        assert (tmp_path / file.name).stat().st_size == 0


def test_a_file_system_that_cannot_reserve(tmp_path, monkeypatch):
    """Where the call fails for another reason, or is not there, the file is as it was: False."""
    with (tmp_path / "file").open("wb") as file:
        with small_disk(4096):
            assert not disk.reserve(file.fileno(), 1 << 20)
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
        assert not disk.reserve(file.fileno(), 1 << 20)
        assert (tmp_path / file.name).stat().st_size == 0
        disk.start_writing(file.fileno(), 0, 1 << 20)  # does nothing, and does not fail


@pytest.mark.parametrize("error", [errno.EDQUOT, errno.ENOSPC])
def test_no_room_is_told_with_its_reason(tmp_path, monkeypatch, error):
    """A full quota is no room either."""

    class System:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(error)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: System)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match=r".") as raised:
        disk.reserve(file.fileno(), 1)
    assert raised.value.errno == error


def test_writing_is_started_where_it_is_asked_for(tmp_path, monkeypatch):
    """The system is given the whole place, also beyond 4 GB, and what is written stays."""
    (tmp_path / "file").write_bytes(b"12345678")
    with (tmp_path / "file").open("r+b") as file:
        disk.start_writing(file.fileno(), 0, 8)
    assert (tmp_path / "file").read_bytes() == b"12345678"
    calls = []

    class System:
        @staticmethod
        def sync_file_range(handle, offset, length, flags):
            calls.append((handle, offset.value, length.value, flags))

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: System)
    disk.start_writing(3, 5 << 32, 6 << 32)
    disk.start_writing(3, 1, 0)
    assert calls == [(3, 5 << 32, 6 << 32, 2)]


def test_shared_memory_is_shared():
    """Two that are attached see what each writes, also when the name is gone; it begins as told."""
    path = shared_memory.make_shared(4096, b"nonce")
    if path is None:
        assert not shared_memory._FOLDER.exists(), "there is a place for it, and room"
        return
    one, other = shared_memory.attached(path), shared_memory.attached(path)
    path.unlink()
    assert bytes(one[:5].tolist()) == b"nonce"
    one[7] = 9
    assert other[7] == 9
    assert one.shape == (4096,)
    assert one.dtype == torch.uint8


def test_no_place_for_shared_memory(tmp_path, monkeypatch):
    """Without such a folder there is none."""
    monkeypatch.setattr(shared_memory, "_FOLDER", tmp_path / "absent")
    assert shared_memory.make_shared(4096, b"nonce") is None
