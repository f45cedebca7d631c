"""Two nodes on one machine, for `torchrun --nnodes 2`.

Where it is allowed they are network namespaces joined by a virtual cable: what one node sends to
an address of the other really leaves it. Elsewhere they are two loopback addresses.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: how to make a network namespace, and to enter it: as root, or as anybody who may be root inside.
WAYS = [([], []), (["--user", "--map-root-user"], ["--user", "--preserve-credentials"])]
CABLE = "tensorpar0"
#: of which no machine needs to know; the namespaces have no other network.
CABLE_ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class Nodes:
    """Two places in which to start torchrun.

    Attributes:
        kind: what they are, for the summary of the tests.
        addresses: of each.
        entrances: the command that runs another one there.
        interface: of the network between them, as gloo wants to be told.
        port: free on the first node.
    """

    kind: str
    addresses: tuple[str, str]
    entrances: tuple[list[str], list[str]]
    interface: str
    port: int

    def torchrun(self, node: int, output: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts two ranks on a node, which wait for those of the other; their output is a file."""
        command = [
            *self.entrances[node],
            *[sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"],
            *["--rdzv-backend=c10d", f"--rdzv-endpoint={self.addresses[0]}:{self.port}"],
            # torchrun tells by its host's name who serves the rendezvous; both nodes have one name
            *[f"--rdzv-conf=is_host={int(node == 0)},join_timeout=120"],
            *[f"--local-addr={self.addresses[node]}", *arguments],
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": self.interface}
        with output.open("wb") as file:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Namespaces if possible, with a reason in `kind` if not; they end with the context."""
    reasons = []
    for create, enter in WAYS:
        with ExitStack() as life:
            try:
                nodes = _namespaces(create, enter, life)
            except (OSError, subprocess.CalledProcessError) as error:
                reasons.append(str(error))
                continue
            yield nodes
            return
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    kind = f"127.0.0.1 and 127.0.0.2, since no network namespace could be made: {reasons[-1]}"
    yield Nodes(kind, ("127.0.0.1", "127.0.0.2"), ([], []), "lo", port)


def _namespaces(create: list[str], enter: list[str], life: ExitStack) -> Nodes:
    """Two of them, of which the second is made inside the first, or could not be joined to it."""
    first = _held(["unshare", *create, "--net"], life)
    inside = ["nsenter", f"--target={first}", *enter, "--net"]
    second = _held([*inside, "unshare", "--net"], life)
    entrances = (inside, ["nsenter", f"--target={second}", *enter, "--net"])
    join = f"link add {CABLE} type veth peer name {CABLE} netns {second}"
    _run([*inside, "ip", *join.split()])
    for entrance, address in zip(entrances, CABLE_ADDRESSES, strict=True):
        _run([*entrance, "ip", "address", "add", f"{address}/24", "dev", CABLE])
        for interface in (CABLE, "lo"):
            _run([*entrance, "ip", "link", "set", interface, "up"])
    kind = "two network namespaces joined by a veth pair"
    return Nodes(kind, CABLE_ADDRESSES, entrances, CABLE, 29500)


def _held(command: list[str], life: ExitStack) -> int:
    """The process whose namespace `command` has made; it waits for the end of its input."""
    holder = life.enter_context(
        subprocess.Popen(
            [*command, "sh", "-c", "echo made; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    if holder.stdout is None or holder.stdout.readline() != "made\n":
        _, told = holder.communicate()
        raise subprocess.CalledProcessError(holder.returncode, command, stderr=told)
    return holder.pid


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
