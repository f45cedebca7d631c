"""The README's table of faults, and the steps lost as a disturbed run has noted them."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

README = (Path(__file__).parents[2] / "README.md").read_text()
ROW = re.compile(
    r"^\|[^|]+\|[^|]+\| (\d+)[^|]*\| \[?`([a-z ]+)`\]?(?:\((\S+)\))? \|$", re.MULTILINE
)
(TABLE,) = re.findall(r"\n\| fault \|.*\n\|[-| ]+\n((?:\|.*\n)+)", README)

Lines = list[dict[str, Any]]


def stated() -> dict[tuple[str, str], int]:
    """Steps lost by fault and the file of tests that makes it happen, where the table names one."""
    found = {(name, file): int(lost) for lost, name, file in ROW.findall(TABLE)}
    assert len(found) == TABLE.count("\n"), "a row of the table of faults is not understood"
    return found


def told_by(folder: Path, rank: int) -> Lines:
    """What a rank has noted, in all its lives."""
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


def steps_lost(lines: Lines) -> list[tuple[int, int]]:
    """For each time that a rank was started again, how many steps were begun and are done again.

    Returns:
        Pairs: those since the newest checkpoint, and those before it, since it was damaged.
    """
    starts = [at for at, line in enumerate(lines) if "start" in line]
    found = []
    for life, after in pairwise(starts):
        saved = max(line.get("saved", 0) for line in lines[:after])
        begun = [line["begun"] for line in lines[life:after] if "begun" in line]
        found.append((sum(step >= saved for step in begun), saved - lines[after]["start"]))
    return found
