"""Advice to the system covers the memory that it is about, and changes no value."""

from __future__ import annotations

import mmap

import pytest
import torch

from tensorpar import paging


@pytest.fixture
def advised(monkeypatch):
    """The calls that would be made."""
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(paging, "_advise", lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize(
    "index", [(slice(None), slice(7, 11)), (slice(30, 90), slice(None)), (slice(None), 5)]
)
def test_what_will_be_read_is_asked_for_and_not_more(advised, index):
    whole = torch.zeros(301, 1000)
    view = whole[index]
    paging.will_be_read(view)
    ((advice, first, end),) = advised
    places = torch.arange(whole.numel()).view_as(whole)[index]
    start, stop = (whole.data_ptr() + 4 * int(place) for place in (places.min(), places.max() + 1))
    assert advice == "MADV_WILLNEED"
    assert start - mmap.PAGESIZE < first <= start
    assert first % mmap.PAGESIZE == 0
    assert end == stop


def test_nothing_is_asked_for_nothing(advised):
    paging.will_be_read(torch.zeros(4, 0))
    assert advised == []


def test_a_mapped_file_is_as_before(tmp_path):
    """The system takes the advice: its answer is not an error."""
    values = torch.randn(64, 512)
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "file"), size=values.numel()).view_as(values)
    paging.will_be_read(mapped[:, 3:200])
    assert mapped.equal(values)


def test_memory_in_large_pages_is_asked_for_whole_pages_only(advised):
    out = paging.empty_in_large_pages((3, 1 << 20), torch.float32)
    ((advice, first, end),) = advised
    assert (advice, out.shape, out.dtype) == ("MADV_HUGEPAGE", (3, 1 << 20), torch.float32)
    assert first % (1 << 21) == end % (1 << 21) == 0
    assert out.data_ptr() <= first < end <= out.data_ptr() + out.nbytes
