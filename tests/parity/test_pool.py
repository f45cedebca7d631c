"""The pool itself: order, failures on any rank, and clean starts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import tensorpar
from tests.pool import Pool


def _who_am_i() -> tuple[int, int, int]:
    total = torch.ones(1)
    dist.all_reduce(total)
    return tensorpar.tp_rank(), tensorpar.tp_size(), int(total)


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"on purpose on rank {rank}")
    dist.barrier()


def _hang() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)


def _die() -> None:
    os._exit(3)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _leave_state() -> tuple[torch.dtype, float, bool]:
    before = torch.get_default_dtype(), torch.rand(()).item(), tensorpar.is_initialized()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(5)
    return before


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    """A pool that may be poisoned without cost to other tests."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_in_the_order_of_the_ranks(ranks, size):
    """A job runs once on each rank of a world of the size asked for."""
    assert ranks(size).run(_who_am_i) == [(rank, size, size) for rank in range(size)]


def test_a_degree_below_the_world_size(ranks):
    """A job can ask for a dp x tp world, and for the next one a different one."""
    assert ranks(4, tensor_parallel_degree=2).run(_who_am_i) == [
        (rank % 2, 2, 4) for rank in range(4)
    ]
    assert ranks(4).run(_who_am_i)[3] == (3, 4, 4)


def test_jobs_start_clean(ranks):
    """What one job leaves in dtype, random state and initialisation is gone in the next."""
    first = ranks(2).run(_leave_state)
    assert ranks(2).run(_leave_state) == first == [first[0]] * 2
    assert [initialised for _, _, initialised in ranks(2, init=False).run(_leave_state)] == [
        False,
        False,
    ]


def test_failures_show_every_rank_and_leave_nothing(own_pool):
    """An exception on one rank ends the job with all ranks' whereabouts; the next job works."""
    ranks = own_pool
    with pytest.raises(AssertionError) as failure:
        ranks(2).run(_fail_on, 1)
    assert "on purpose on rank 1" in str(failure.value)
    assert "rank 0" in str(failure.value)
    assert "barrier" in str(failure.value)
    with pytest.raises(AssertionError, match="rank 1 was given up"):
        ranks(2).run(_hang, timeout=1.0)
    with pytest.raises(AssertionError, match="rank 0 died, exit code 3"):
        ranks(1).run(_die)
    with pytest.raises(AssertionError, match=r"rank 0 died, exit code -11(.|\n)*in _crash"):
        ranks(1).run(_crash)
    assert ranks(2).run(_who_am_i) == [(0, 2, 2), (1, 2, 2)]
