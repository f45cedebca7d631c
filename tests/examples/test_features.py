"""The README claims what the tests prove, no more and no less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_features_is_that_of_the_tests(tmp_path):
    """Collected in a process of its own, since this session may run a part of the tests only."""
    stated = (ROOT / "README.md").read_text()
    (copy := tmp_path / "README.md").write_text(stated)
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--features={copy}"]
    told = subprocess.run(
        collect, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert told.returncode == 0, told.stdout
    assert copy.read_text() == stated, "the README's table is old: run `make features`"
