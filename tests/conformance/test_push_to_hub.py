"""What one rank uploads is what one process would: whole folders, once; nobody waits for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

import tensorpar
from tests.conformance.families import build
from tests.conformance.gpt2 import default_dtype, require_close, weights_of
from tests.conformance.test_life_cycle_lora import lora
from tests.conformance.test_trainer import HEADS, MESHES, TOLERANCE, mine
from tests.conformance.training import announced, arguments, make

#: file names of an upload, by where they go in the repository, with what is said of them.
Upload = tuple[str, str, str | None, list[str]]

#: what a checkpoint is resumed from: ours, and in its place Transformers'.
RESUMED_FROM = ("step-", "optimizer.pt", "rng_state", "scheduler.pt")


@dataclass
class Hub:
    """In place of the network: what this process has made and uploaded; files are kept."""

    kept: Path
    repositories: list[str] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)

    def create_repo(self, repo_id: str, **_: Any) -> huggingface_hub.RepoUrl:
        self.repositories.append(repo_id)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def create_commit(self, repo_id: str, operations: Any, commit_message: str, **_: Any) -> str:
        files = {each.path_in_repo: Path(each.path_or_fileobj) for each in operations}
        return self._keep(repo_id, commit_message, None, files)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        path_in_repo: str | None = None,
        ignore_patterns: Any = None,
        run_as_future: bool = False,
        **_: Any,
    ) -> Any:
        paths = {
            path.relative_to(folder_path).as_posix(): path
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }
        names = filter_repo_objects(paths, ignore_patterns=[*(ignore_patterns or []), "*/_*"])
        files = {name: paths[name] for name in names}
        said = self._keep(repo_id, commit_message, path_in_repo, files)
        return Done(said) if run_as_future else said

    def _keep(self, repo: str, said: str, place: str | None, files: dict[str, Path]) -> str:
        for name, path in files.items():
            target = self.kept / str(len(self.uploads)) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
        names = sorted(name for name in files if not name.startswith(RESUMED_FROM))
        self.uploads.append((repo, said, place, names))
        return said

    @contextmanager
    def instead_of_network(self) -> Iterator[None]:
        """Within: this is the hub, and it has no model cards yet."""

        def no_card(*_: Any, **__: Any) -> NoReturn:
            raise EntryNotFoundError("a new repository")

        with pytest.MonkeyPatch.context() as patch:
            for name in ("create_repo", "create_commit", "upload_folder"):
                stub = getattr(self, name)
                patch.setattr(
                    huggingface_hub.HfApi,
                    name,
                    lambda _, *args, stub=stub, **more: stub(*args, **more),
                )
            patch.setattr("huggingface_hub.repocard.hf_hub_download", no_card)
            patch.setenv("HF_TOKEN", "none")
            yield


@dataclass
class Done:
    """The future of an upload."""

    said: str

    def done(self) -> bool:
        return True

    def result(self) -> str:
        return self.said


def trainer_pushes(trainer: type, folder: str, kept: str, strategy: str, **more: Any) -> Hub:
    """A run that pushes by itself, then when it is told to, then when it saves."""
    hub = Hub(Path(kept))
    args = arguments(
        f"{folder}/mine",
        data_ranks=tensorpar.rdp_size() if tensorpar.is_initialized() else 1,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    with hub.instead_of_network():
        run = make(trainer, "bert", HEADS["bert"], args, **more)
        run.train()
        said = run.push_to_hub(commit_message="by hand")
        assert said == ("by hand" if hub.uploads else None)
        run.save_model()
    return hub


def trainer_pushes_on_ranks(folder: str, kept: str, strategy: str, kind: Any) -> Hub:
    """The same on every rank."""
    with announced(), default_dtype(torch.float64):
        own = f"{kept}/{tensorpar.rank()}"
        return trainer_pushes(mine(), folder, own, strategy, data_parallel=kind)


@pytest.mark.parametrize(
    ("mesh", "strategy"), [("tp 2", "checkpoint"), ("2 x 2 fsdp", "every_save"), ("tp 2", "end")]
)
def test_a_trainer_pushes_what_one_process_would(ranks, tmp_path, mesh, strategy):
    """The same uploads of the same files, in order, by the first rank alone; weights are whole."""
    size, degree, kind = MESHES[mesh]
    with default_dtype(torch.float64):
        folder, kept = tmp_path / "one", tmp_path / "one's uploads"
        reference = trainer_pushes(transformers.Trainer, str(folder), str(kept), strategy)
    assert len(reference.uploads) == {"checkpoint": 6, "every_save": 4, "end": 2}[strategy]
    pool = ranks(size, tensor_parallel_degree=degree)
    arguments = (str(tmp_path / "many"), str(tmp_path / "uploads"), strategy, kind)
    first, *others = pool.run(trainer_pushes_on_ranks, *arguments)
    assert first.uploads == reference.uploads
    assert first.repositories == reference.repositories == ["mine"]
    assert all(not other.uploads and not other.repositories for other in others)
    model = getattr(transformers, HEADS["bert"])
    for number, (_, said, _, names) in enumerate(first.uploads):
        assert {"model.safetensors", "config.json", "training_args.bin"} <= set(names), said
        ours, theirs = (
            weights_of(model.from_pretrained(hub.kept / str(number))) for hub in (first, reference)
        )
        require_close(ours, theirs, TOLERANCE["bert"])
        sharded = list((first.kept / str(number)).glob("step-*/complete.json"))
        assert bool(sharded) == said.endswith(", checkpoint")


def models_push(kept: str, parallel: bool) -> Hub:
    """A model, one in a `DistributedModel`, and adapters are pushed."""
    hub = Hub(Path(kept) / str(tensorpar.rank() if parallel else "alone"))
    head = "GPT2LMHeadModel"
    with hub.instead_of_network(), default_dtype(torch.float64):
        model = build("gpt2", head, parallel=parallel)
        model.add_model_tags(["tiny"])
        told = [model.push_to_hub("one", max_shard_size="20KB", tags=["more"])]
        if parallel:
            model = tensorpar.DistributedModel(model)
        told.append(model.push_to_hub("two", commit_message="wrapped"))
        inner = model.get_module() if parallel else model
        torch.manual_seed(5)
        adapted = peft.get_peft_model(inner, lora("gpt2"))
        told.append(adapted.push_to_hub("three"))
    assert told == [said for _, said, _, _ in hub.uploads] or told == [None] * 3
    return hub


def content(file: Path) -> Any:
    """The bytes; of peft's config what it says, since it writes a set as it comes."""
    if file.name != "adapter_config.json":
        return file.read_bytes()
    said = json.loads(file.read_text())
    return {**said, "target_modules": sorted(said["target_modules"])}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_is_pushed_whole(ranks, tmp_path):
    """`model.push_to_hub` on every rank: one upload, of the files and bytes of one process."""
    reference = models_push(str(tmp_path), False)
    first, other = ranks(2).run(models_push, str(tmp_path), True)
    assert not other.uploads
    assert not other.repositories
    assert first.repositories == reference.repositories == ["one", "two", "three"]
    assert first.uploads == reference.uploads
    for number, (_, said, _, names) in enumerate(first.uploads):
        assert (sum(name.endswith(".safetensors") for name in names) > 1) == (number == 0), said
        for name in names:
            ours, theirs = (hub.kept / str(number) / name for hub in (first, reference))
            assert content(ours) == content(theirs), name
