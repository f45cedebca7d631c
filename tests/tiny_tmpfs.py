"""A file system of a few kilobytes, which is really full when it is full.

It is mounted in a namespace of its own, which ends with the process that lives there; where no
namespace can be made, neither as root nor as anybody who may be root inside, `REASON` says why.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

#: how to make a namespace of mounts: as root, or as anybody who may be root inside.
WAYS = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
SCRIPT = 'mount -t tmpfs -o size=$0 tmpfs "$1" && shift && exec "$@"'


def run_in(folder: Path, size: str, code: str, *arguments: str) -> str | None:
    """What a script prints that runs with `folder` mounted; None where nothing can be mounted.

    Args:
        folder: exists; what is written there is gone afterwards.
        size: of the file system, e.g. `"64k"`.
        code: Python.
        arguments: of the script.
    """
    for way in WAYS:
        probe = [*way, "sh", "-c", SCRIPT, size, str(folder), "true"]
        if subprocess.run(probe, capture_output=True, check=False, timeout=60).returncode:
            continue
        command = [*way, "sh", "-c", SCRIPT, size, str(folder), sys.executable, "-c", code]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    return None
