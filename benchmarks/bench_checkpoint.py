"""Checkpoints: translated on disk, loaded, saved, and translated in memory, beside what others do.

Each part makes its model on the spot, lets the contestants take turns and writes a result of its
own. Run as `python benchmarks/bench_checkpoint.py`, or a part of it as
`python benchmarks/bench_checkpoint.py --parts translate --size 6 --turns 5`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from checkpoints import in_memory, loading, saving, translating

#: what is measured, and with how many billions of parameters if nothing is said.
PARTS = {
    "translate": (translating.measure, 6),
    "load": (loading.measure, 1),
    "save": (saving.measure, 1),
    "in-memory": (in_memory.measure, None),
}


def main() -> None:
    args = parse_arguments()
    for name in args.parts:
        measure, size = PARTS[name]
        print(f"\n{name}: {measure.__module__.partition('.')[2]}.py")
        measure(argparse.Namespace(**{**vars(args), "size": args.size or size}))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", type=float, help="billions of parameters")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tp", type=int, default=4, help="the degree translated to")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="a contestant's")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
