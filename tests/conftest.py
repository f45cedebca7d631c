"""What all tests share: the ranks, and how many examples hypothesis tries."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.pool import Pool

pytest_plugins = ["tests.features"]

settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(n).run(fn, *args)` runs a top-level function on n ranks."""
    pool = Pool()
    yield pool
    pool.close()
