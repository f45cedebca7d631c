"""Where checkpoints are kept: on the disk when they are one, and on stores that ranks share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

import tensorpar
from tensorpar.checkpoint import checksummed
from tensorpar.files.disk import sync
from tests.conformance.families import BEHIND_FLOAT32
from tests.conformance.gpt2 import require_close, require_equal_ranks
from tests.conformance.test_checkpoint import (
    MESHES,
    SAVED,
    Run,
    cut,
    failing_save,
    flip_a_bit,
    listed,
    load_step,
    resume,
    save_midway,
    save_often,
    two_saves,
    undisturbed,
)


class Store(DirFileSystem):
    """`bucket://` any folder, as an object store shows it.

    Folders cannot be renamed, and a process remembers what it has listed until it writes itself.
    """

    protocol = "bucket"

    def __init__(self, **options: Any) -> None:
        super().__init__(path="/", fs=LocalFileSystem(auto_mkdir=True), **options)
        self._listed: dict[str, list[dict[str, Any]]] = {}

    def invalidate_cache(self, path: str | None = None) -> None:
        self._listed.clear()

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if path not in self._listed:
            self._listed[path] = super().ls(path, detail=True, **kwargs)
        return [one if detail else one["name"] for one in self._listed[path]]

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        assert not self.isdir(path1), "an object store has no folders to rename"
        self.invalidate_cache()
        super().mv(path1, path2, **kwargs)

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if "r" not in mode:
            self.invalidate_cache()
        return super().open(path, mode, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self.invalidate_cache()
        super().pipe_file(path, value, **kwargs)

    def makedirs(self, path: str, *args: Any, **kwargs: Any) -> None:
        self.invalidate_cache()
        super().makedirs(path, *args, **kwargs)

    def rm(self, path: str, *args: Any, **kwargs: Any) -> None:
        self.invalidate_cache()
        super().rm(path, *args, **kwargs)


fsspec.register_implementation(Store.protocol, Store, clobber=True)


def on(place: str, job: Callable[..., Any], *args: Any) -> Any:
    """`job` at a place, which may be in the store: importing this module makes it known."""
    return job(place, *args)


def kept_by_fsspec() -> int | None:
    """The step that is read back from a store that belongs to this process."""
    save_often("memory://run", 2)
    resumed = tensorpar.load_checkpoint("memory://run", **Run().parts)
    return resumed and resumed.step


def test_stores_of_fsspec(ranks):
    """A URL in place of a path."""
    assert ranks(1).run(kept_by_fsspec) == [3]


def events_of_a_save(folder: str) -> list[str]:
    """What rank 0 has synced, and renamed, in order."""
    seen: list[str] = []

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def told(path: Any, *args: Any) -> Any:
            seen.append(f"{call.__name__} {Path(path).name}")
            return call(path, *args)

        return told

    run = Run()
    tensorpar.save_checkpoint(folder, 2, **run.parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tensorpar.checkpoint.folder.sync", noted(sync))
        patch.setattr(Path, "rename", noted(Path.rename))
        patch.setattr(shutil, "rmtree", noted(shutil.rmtree))
        tensorpar.save_checkpoint(folder, 2, **run.parts)
    return seen


def test_all_is_on_the_disk_before_it_is_a_checkpoint(ranks, tmp_path):
    """Every file, of all ranks, then the folder; what it replaces goes last before its renaming."""
    seen, _ = ranks(2).run(events_of_a_save, str(tmp_path))
    files = ("__0_0.distcp", "__1_0.distcp", ".metadata", "complete.json")
    assert sorted(seen[:4]) == sorted(f"sync {file}" for file in files)
    assert seen[4:] == [
        "sync .step-000000002",
        "rmtree step-000000002",
        "rename .step-000000002",
        f"sync {tmp_path.name}",
    ]


@pytest.mark.parametrize(("in_background", "resumed"), [(False, "tp 4"), (True, "2 x 2 fsdp")])
def test_resuming_at_another_mesh(ranks, tmp_path, in_background, resumed):
    """Ranks write and others read what they share; as in a folder, to rounding."""
    folder, store = str(tmp_path), f"bucket:/{tmp_path}"
    ranks(2).run(on, store, save_midway, None, 0.0, in_background)
    assert listed(folder) == [f"step-{SAVED:09}"]
    size, degree, kind = MESHES[resumed]
    pool = ranks(size, tensor_parallel_degree=degree)
    results = pool.run(on, store, resume, kind, 0.0)
    require_equal_ranks(results)
    require_close(results[0], ranks(1).run(undisturbed, None, 0.0)[0], BEHIND_FLOAT32)


def test_damage_and_what_is_kept(ranks, tmp_path):
    """The newest whole one is taken by every rank; others' saves are seen; the oldest go."""
    folder, store = str(tmp_path), f"bucket:/{tmp_path}"
    first = ranks(2).run(on, store, two_saves)[0]
    for name, damage in (("__1_0.distcp", flip_a_bit), (".metadata", cut)):
        file = tmp_path / "step-000000002" / name
        whole = file.read_bytes()
        damage(file, 0.5)
        for step, weights in ranks(2).run(on, store, load_step):
            assert step == 1
            require_close(weights, first, 0.0)
        file.write_bytes(whole)
    ranks(1).run(on, store, save_often, 2)
    assert listed(folder) == ["step-000000002", "step-000000003"]
    assert [step for step, _ in ranks(2).run(on, store, load_step)] == [3, 3]


def test_a_full_store(ranks, tmp_path):
    """One rank cannot write: an error on all, and nothing of it is left."""
    for told, step in ranks(2).run(on, f"bucket:/{tmp_path}", failing_save):
        assert "File too large" in told
        assert step == 1
    assert listed(str(tmp_path)) == ["step-000000001"]


def killed_in_a_save(place: str, in_background: bool) -> None:
    """Rank 0 dies, which would clean up, as it writes step 2's checkpoint; step 1's is whole."""
    run = Run()
    tensorpar.save_checkpoint(place, 1, **run.parts)
    if tensorpar.rank() == 0:
        checksummed.Checksummed.transform_to = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    pending = tensorpar.save_checkpoint(place, 2, **run.parts, async_save=in_background)
    if pending is not None:
        pending.wait()


def save_again(place: str) -> int:
    """Continue, and save once more; the step from where."""
    run = Run()
    resumed = tensorpar.load_checkpoint(place, **run.parts)
    tensorpar.save_checkpoint(place, 3, **run.parts)
    assert resumed is not None
    return resumed.step


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("prefix", ["", "bucket:/"])
def test_a_rank_killed_in_a_save(ranks, tmp_path, prefix, in_background):
    """What it has left is no checkpoint, and goes with the next save."""
    place = prefix + str(tmp_path)
    with pytest.raises(AssertionError, match="rank 0 died"):
        ranks(2).run(on, place, killed_in_a_save, in_background)
    (left,) = (one for one in tmp_path.iterdir() if one.name != "step-000000001")
    assert not (left / "complete.json").exists()
    assert ranks(2).run(on, place, save_again) == [1, 1]
    assert listed(str(tmp_path)) == ["step-000000001", "step-000000003"]
