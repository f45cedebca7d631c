"""A folder's files are replaced as one, also by a process that is killed at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorpar.files import replacing

#: writes a second save and dies at the n-th step that changes what is on the disk.
CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path
source, folder, fatal, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
def module(name, file):  # tensorpar itself would import torch, for seconds
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
module("tensorpar.files.disk", Path(source).with_name("disk.py"))
replacing = module("tensorpar.files.replacing", source)
steps = 0
def deadly(call):
    def step(*args, **kwargs):
        global steps
        steps += 1
        if steps == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return step
os.fsync = lambda handle: None  # a killed process loses nothing that the system has
for name in ("rename", "replace", "unlink", "link", "fsync", "mkdir", "rmdir"):
    setattr(os, name, deadly(getattr(os, name)))
if mode == "one by one":
    replacing.exchange_names = lambda *_: False
else:
    replacing.exchange_names = deadly(replacing.exchange_names)
if mode == "no links":
    def refuse(*_, **__):
        raise PermissionError("no links here")
    os.link = refuse
if mode == "worked in":
    os.chdir(folder)
    folder = "."
with replacing.replacing(folder, lambda name: name.startswith("model")) as files:
    for name in ("model-1", "model-2", "model.index.json", "config"):
        (files / name).write_text("new")
"""
OLD = ("model-1", "model-2", "model-3", "model.index.json", "config")
NEW = ("model-1", "model-2", "model.index.json", "config")


def stale(name: str) -> bool:
    """Whether a file is a model's."""
    return name.startswith("model")


def make_old(folder: Path) -> None:
    """A folder with an old save, and with what else may be in it."""
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "log").write_text("mine")
    (folder / "tokenizer").write_text("mine")
    (folder / "link").symlink_to("tokenizer")
    for name in OLD:
        (folder / name).write_text("old")


def contents(folder: Path) -> dict[str, str]:
    """Every file of the save by its name."""
    return {name: (folder / name).read_text() for name in OLD if (folder / name).exists()}


def require_others(folder: Path) -> None:
    """What was not the save's is as it was, and nothing has come to it."""
    assert (folder / "tokenizer").read_text() == "mine"
    assert (folder / "link").readlink() == Path("tokenizer")
    names = {path.name for path in folder.iterdir()}
    assert names == {*NEW, "tokenizer", "link", "runs"}
    assert (folder / "runs" / "log").read_text() == "mine"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def killed_saves(tmp_path: Path, mode: str, old: bool) -> Iterator[Path]:
    """The folder after each save that was killed, one step later each time; then a whole one."""
    for fatal in range(1, 200):
        folder = tmp_path / str(fatal) / "out"
        if old:
            make_old(folder)
        else:
            folder.parent.mkdir()
        command = [sys.executable, "-S", "-c", CHILD, str(replacing.__file__), str(folder)]
        done = subprocess.run([*command, str(fatal), mode], check=False, timeout=60)
        yield folder
        with replacing.replacing(folder, stale) as files:
            for name in NEW:
                (files / name).write_text("newer")
        assert contents(folder) == dict.fromkeys(NEW, "newer")
        assert [path.name for path in folder.parent.iterdir()] == ["out"]
        if old:
            require_others(folder)
        if done.returncode == 0:
            assert fatal > 8
            return
        assert done.returncode == -signal.SIGKILL
    raise AssertionError("the save never ends")


def test_a_killed_save_leaves_the_old_folder_or_the_new(tmp_path):
    """At every step the save's files are all old or all new, and files of others are there.

    The next save finds nothing broken, brings back what was on its way, and leaves nothing over.
    """
    seen = []
    for folder in killed_saves(tmp_path, "exchange", old=True):
        found = contents(folder)
        assert found in (dict.fromkeys(OLD, "old"), dict.fromkeys(NEW, "new"))
        assert (folder / "tokenizer").read_text() == "mine"
        assert (folder / "link").is_symlink()
        seen.append(found["config"])
    assert seen == sorted(seen, reverse=True)  # "old" until the exchange, "new" after it
    assert set(seen) == {"old", "new"}


def test_a_killed_first_save_leaves_nothing_or_all(tmp_path):
    """A folder that did not exist is absent or whole."""
    found = [contents(folder) for folder in killed_saves(tmp_path, "exchange", old=False)]
    assert all(one in ({}, dict.fromkeys(NEW, "new")) for one in found)
    assert found[0] == {}


@pytest.mark.parametrize("mode", ["one by one", "no links", "worked in"])
def test_where_names_cannot_be_exchanged(tmp_path, mode):
    """Every file is old or new, and an index is there only with shards of its own save."""
    states = []
    for folder in killed_saves(tmp_path, mode, old=True):
        found = contents(folder)
        assert set(found.values()) <= {"old", "new"}
        assert {"model-1", "model-2", "config"} <= set(found)
        if "model.index.json" in found:
            assert len({found[name] for name in NEW}) == 1, found
        states.append(found)
    assert states[0] == dict.fromkeys(OLD, "old")
    assert states[-1] == dict.fromkeys(NEW, "new")


def test_one_changed_file_is_replaced_at_once(tmp_path, monkeypatch):
    """Without exchange: if only the weights differ, one rename does it."""
    monkeypatch.setattr(replacing, "exchange_names", lambda *_: False)
    (tmp_path / "config").write_text("same")
    (tmp_path / "model").write_text("old")
    before = (tmp_path / "config").stat()
    replaced = []
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append(b.name), Path(a).rename(b)))
    with replacing.replacing(tmp_path, stale) as files:
        (files / "config").write_text("same")
        (files / "model").write_text("new")
    assert replaced == ["model"]
    assert (tmp_path / "model").read_text() == "new"
    assert (tmp_path / "config").stat().st_ino == before.st_ino


def full_disk(folder: Path) -> None:
    """A save that fails on its way."""
    with replacing.replacing(folder, stale) as files:
        (files / "model-1").write_text("new")
        raise OSError("the disk is full")


def test_an_exception_leaves_the_folder_as_it_was(tmp_path):
    """Nothing of a save that raises is seen, and a file in the way is refused."""
    make_old(tmp_path / "out")
    with pytest.raises(OSError, match="full"):
        full_disk(tmp_path / "out")
    assert contents(tmp_path / "out") == dict.fromkeys(OLD, "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ValueError, match="is a file"),
        replacing.replacing(tmp_path / "file", stale),
    ):
        pass


def test_a_linked_folder_stays_a_link(tmp_path):
    """A symbolic link to the folder still leads to it, with the new files and the old mode."""
    make_old(tmp_path / "real")
    (tmp_path / "real").chmod(0o750)
    (tmp_path / "out").symlink_to("real")
    with replacing.replacing(tmp_path / "out", stale) as files:
        for name in NEW:
            (files / name).write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "real") == dict.fromkeys(NEW, "new")
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o750
