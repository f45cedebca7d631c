"""The commands for launching are ones that torchrun understands, and `init` accepts."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

PAGE = (Path(__file__).parents[2] / "docs/launching.md").read_text()
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
(MANIFEST,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def understood(words: list[str]) -> Namespace:
    """torchrun's reading of a command; it exits with an error at what it does not know."""
    return get_args_parser().parse_args(words[words.index("torchrun") + 1 :])


def test_commands_of_the_shell():
    """One node, two by hand, Slurm: flags exist, and a restart on several nodes can work."""
    assert len(SHELL) == 3
    for block in SHELL:
        words = shlex.split(block.replace("\\\n", " "), comments=True)
        read = understood(words)
        assert read.training_script == "train.py"
        if not read.standalone:
            assert read.rdzv_backend == "c10d"
            assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in words


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
