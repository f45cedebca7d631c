"""What all tests share: the ranks, and how many examples hypothesis tries."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.pool import Pool

pytest_plugins = ["tests.features"]

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=60, deadline=None, derandomize=True)
# references are tiny, and several processes share the cores
torch.set_num_threads(1)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests say about the machine they ran on, with `record_property("summary", ...)`."""
    reports = (report for group in terminalreporter.stats.values() for report in group)
    properties = (pair for report in reports for pair in getattr(report, "user_properties", ()))
    for line in sorted({text for name, text in properties if name == "summary"}):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(n).run(fn, *args)` runs a top-level function on n ranks."""
    pool = Pool()
    yield pool
    pool.close()
