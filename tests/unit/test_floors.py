"""The house stands on its floors: a file imports only from floors below its own."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: from the ground up; files on one floor do not know of each other, unless named in STAIRS.
FLOORS = [
    {
        "config",
        "foreign_shards",
        "hf_compat",
        "hf_masks",
        "hf_trainer",
        "open_attention",
        "options",
        "paging",
        "partition",
        "pattern",
        "problems",
        "promise",
        "random",
        "rendezvous",
    },
    {"files", "hf_construction", "together"},
    {"mesh", "messages", "parameters", "styles", "moments"},
    {"collectives", "ranks", "registry", "gathering", "empty_shards"},
    {"rows"},
    {"preemption", "region", "agreement", "own_batches", "replace", "reproducible"},
    {"guard", "whole_weights"},
    {"nn"},
    {"doors", "model_doors", "sequence", "delayed", "families", "recognition"},
    {
        "optimizer_fit",
        "saving",
        "loading",
        "initialising",
        "attention_choice",
        "adapter_files",
        "data_parallel",
    },
    {"narrowing"},
    {"resizing", "lora", "given_tensors"},
    {"parallelize"},
    {"context", "model"},
    {"optimizer", "sharded_files", "checkpoint"},
    {"planning", "trainer"},
    {"command"},
    {"__main__"},
]
#: two rooms on one floor that may know of each other, in this direction only.
STAIRS = {("mesh", "config"), ("saving", "model_doors")}
#: what may import the translators, and only while a function runs.
DOORS_TO_TRANSLATORS = {"model.py", "loading.py", "recognition.py", "nn/huggingface", "command.py"}

FILES = sorted((ROOT / "tensorpar").rglob("*.py"))


def room(file: Path) -> str:
    """The name under which a file stands in FLOORS: its top-level module or folder."""
    return file.relative_to(ROOT / "tensorpar").parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    """Top-level modules or folders of tensorpar that a file names in imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "tensorpar":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorpar."):
            found.add(str(node.module).split(".")[1])
    return found


def floor(name: str) -> int:
    (number,) = (number for number, rooms in enumerate(FLOORS) if name in rooms)
    return number


def test_every_file_has_a_floor():
    """FLOORS names each module of the package once, and nothing else."""
    rooms = {room(file) for file in FILES if room(file) != "__init__"}
    named = [name for rooms_ in FLOORS for name in rooms_]
    assert sorted(named) == sorted(rooms)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_downwards(file):
    """A file imports from its own folder and from floors below, never from above."""
    own = room(file)
    if own == "__init__":
        return
    for name in imported_rooms(ast.parse(file.read_text())) - {own, "translators"}:
        below = floor(name) < floor(own)
        assert below or (own, name) in STAIRS, f"{file} imports {name} from its floor or above"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_translators_are_imported_at_the_doors_only(file):
    """tensorpar knows of its translators only where files and state dicts come in, and lazily."""
    tree = ast.parse(file.read_text())
    place = str(file.relative_to(ROOT / "tensorpar"))
    at_a_door = any(place.startswith(door) for door in DOORS_TO_TRANSLATORS)
    if "translators" in imported_rooms(tree):
        assert at_a_door, f"{place} imports the translators"
    at_module_level = {
        name
        for node in tree.body
        for name in imported_rooms(ast.Module([node], []))
        if isinstance(node, ast.ImportFrom)
    }
    if not place.startswith("nn/huggingface"):
        assert "translators" not in at_module_level


def test_every_folder_is_installed():
    """What setup.cfg lists is what there is: an editable install would not miss a folder."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {file.parent.relative_to(ROOT) for file in FILES if file.name == "__init__.py"}
    packages = {".".join(folder.parts) for folder in folders} | {"tensorpar.translators"}
    assert set(setup["options"]["packages"].split()) == packages


def test_no_room_without_an_idea():
    """No file is called utils, common or misc."""
    names = {file.stem for file in [*FILES, *(ROOT / "translators").rglob("*.py")]}
    assert not names & {"utils", "common", "misc", "helpers"}


@pytest.mark.parametrize("folder", ["tensorpar", "translators", "tests", "benchmarks", "examples"])
def test_files_are_short(folder):
    """A file holds one idea: at most about 300 lines."""
    long = {
        str(file.relative_to(ROOT)): length
        for file in (ROOT / folder).rglob("*.py")
        if (length := len(file.read_text().splitlines())) > 320
    }
    assert not long


def fresh_interpreter(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_tensorpar_imports_no_transformers():
    """`import tensorpar` is quick: neither Transformers nor the translators come with it."""
    heavy = fresh_interpreter(
        "import tensorpar, sys; "
        "print([m for m in ('transformers', 'tensorpar.translators') if m in sys.modules])"
    )
    assert heavy.strip() == "[]"


def test_every_module_imports_alone():
    """Each module can be the first one imported: there is no hidden order, no circle.

    `import tensorpar` comes before any of them, and brings most; each other one is imported with
    the rest of them forgotten.
    """
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in FILES
    ]
    code = f"""
import importlib, sys
import tensorpar
always = set(sys.modules)
for module in {modules!r}:
    for name in [n for n in sys.modules if n.split('.')[0] == 'tensorpar' and n not in always]:
        del sys.modules[name]
    importlib.import_module(module)
print('all')
"""
    assert fresh_interpreter(code).strip() == "all"
