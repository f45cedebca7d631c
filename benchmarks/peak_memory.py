"""The peak of this process's anonymous memory: what it allocated, files it mapped left out."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


def memory(name: str) -> int:
    """Bytes now, by Linux's name for them: `RssAnon`, `VmRSS`, `VmHWM`."""
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def anonymous_bytes() -> int:
    """What the process has allocated and touched, files that it mapped left out."""
    return memory("RssAnon")


class Peak:
    """Within: the memory is read every millisecond; `bytes` is its peak above the value before."""

    def __init__(self) -> None:
        self.bytes = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._before = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.001):
            self.bytes = max(self.bytes, anonymous_bytes() - self._before)
