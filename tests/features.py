"""The README's table of features and families, made from the tests that prove each cell.

A pytest plugin: `pytest --collect-only --features=README.md` writes the table into that file.
A test proves a feature by the marker `feature(name)`, and an argument `family` or the marker's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.families import FAMILIES, PLANS_ONLY

PLACE = re.compile(r"(?<=<!-- features: begin -->\n).*?(?=<!-- features: end -->)", re.DOTALL)
TITLES = {case.name: case.title for case in (*FAMILIES, *PLANS_ONLY)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option, which takes the file that holds the table's place."""
    parser.addoption("--features", type=Path, help="write the table of features into this file")


@pytest.hookimpl(tryfirst=True)  # before `-m` and `-k` take tests away
def pytest_collection_modifyitems(config: pytest.Config, items: Iterable[pytest.Function]) -> None:
    """Called once, with all tests."""
    if (file := config.getoption("--features")) is not None:
        new = table(proofs(items))
        file.write_text(PLACE.sub(lambda _: new, file.read_text()))


def proofs(items: Iterable[pytest.Function]) -> dict[str, dict[str, str]]:
    """Feature to family to the file whose tests prove it."""
    found: dict[str, dict[str, str]] = {}
    for item in items:
        arguments = item.callspec.params if hasattr(item, "callspec") else {}
        for marker in item.iter_markers("feature"):
            family = marker.kwargs.get("family") or arguments["family"]
            file = item.path.relative_to(item.config.rootpath).as_posix()
            found.setdefault(marker.args[0], {})[family] = file
    return found


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: a row a feature, a column a family, a check mark where there is a test."""
    rows = [["", *TITLES.values()], ["---", *[":-:" for _ in TITLES]]]
    for feature, families in sorted(found.items(), key=lambda row: row[0].lower()):
        file = next(iter(families.values()))
        cells = ["✓" if family in families else "" for family in TITLES]
        rows.append([f"[{feature}]({file})", *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
