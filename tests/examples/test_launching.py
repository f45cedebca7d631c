"""The commands for launching are ones that torchrun understands, and `init` accepts."""

from __future__ import annotations

import os
import re
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

PAGE = (Path(__file__).parents[2] / "docs/launching.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(MANIFEST,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def understood(words: list[str]) -> Namespace:
    """torchrun's reading of a command; it exits with an error at what it does not know."""
    return get_args_parser().parse_args(words[words.index("torchrun") + 1 :])


#: in place of commands that a cluster has: torchrun's variable, then its arguments.
STUBS = r"""
torchrun() { printf '%s\n' "store: ${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-shared}" torchrun "$@"; }
srun() { [ "$1" = --kill-on-bad-exit=1 ] && "${@:2}"; }
scontrol() { [ "$*" = 'show hostnames a[0-1]' ] && printf 'a0\na1\n'; }
"""
SLURM = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a[0-1]"}


@pytest.mark.parametrize(
    ("block", "nodes", "meeting"),
    list(zip(SHELL, ("1:1", "2", "2"), ("", "node0", "a0"), strict=True)),
)
def test_commands_of_the_shell(block, nodes, meeting):
    """One node, two by hand, Slurm: bash runs them, torchrun understands, a restart can work."""
    done = subprocess.run(
        ["bash", "-euc", STUBS + block],
        env={"PATH": os.environ["PATH"], **(SLURM if "srun" in block else {})},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    words = done.stdout.splitlines()
    read = understood(words)
    assert (read.training_script, read.nnodes, read.nproc_per_node) == ("train.py", nodes, "8")
    assert int(read.max_restarts) > 0
    if not read.standalone:
        assert read.rdzv_backend == "c10d"
        assert read.rdzv_endpoint == f"{meeting}:29500"
        assert read.rdzv_id == ("7" if "srun" in block else "run1")
        assert words[0] == "store: 1"


def test_the_manifest_for_kubernetes():
    """It is YAML, its torchrun is told as many nodes as there are pods, and meets at the first."""
    service, job = yaml.safe_load_all(MANIFEST)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    read = understood(container["command"])
    assert int(read.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    name = service["metadata"]["name"]
    assert pod["subdomain"] == name
    assert read.rdzv_endpoint == f"{job['metadata']['name']}-0.{name}:29500"
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]
