"""Every item of a checkpoint followed by its CRC-32, so that a damaged one is never loaded.

An extension of torch.distributed.checkpoint, which checks nothing of what it reads.
"""

from __future__ import annotations

import io
import zlib
from typing import IO, Any

from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension

_BYTES = 4


class Checksummed(StreamTransformExtension):
    """Appends the checksum when an item has been written, and requires it when it is read."""

    @staticmethod
    def registry_name() -> str:
        """The name under which metadata mentions it."""
        return "tensorpar.crc32"

    @staticmethod
    def from_descriptor(version: str) -> Checksummed:
        """The extension that reads what was written by `version`."""
        if version != "1":
            raise ValueError(f"checksum version = {version!r}, required: '1'; update tensorpar")
        return Checksummed()

    def get_descriptor(self) -> str:
        """Name and version, kept beside each item."""
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """A stream that passes on what is written to it, and at its end the checksum."""
        return _Appending(output)  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        """The item, read whole.

        Raises:
            ValueError: its checksum is another.
        """
        content = input.read()
        item, stored = content[:-_BYTES], content[-_BYTES:]
        if len(stored) < _BYTES or zlib.crc32(item).to_bytes(_BYTES, "big") != stored:
            raise ValueError("an item's checksum does not fit its content: the file is damaged")
        return io.BytesIO(item)


class _Appending(io.RawIOBase):
    def __init__(self, output: IO[bytes]) -> None:
        self._output, self._crc = output, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._crc = zlib.crc32(view, self._crc)
        self._output.write(view)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            self._output.write(self._crc.to_bytes(_BYTES, "big"))
            super().close()


def registry() -> ExtensionRegistry:
    """torch's extensions and this one."""
    known = ExtensionRegistry()
    known.register(Checksummed)
    return known
