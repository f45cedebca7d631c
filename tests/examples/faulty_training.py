"""A training script to be disturbed: `torchrun ... faulty_training.py FOLDER FAULT`.

It resumes from the newest checkpoint, as any script should. FAULT strikes once, in the first life
of the run only; what has struck is noted in the folder.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import transformers

import tensorpar
from tensorpar.checkpoint.checksummed import Checksummed

STEPS = 6


def main() -> None:
    folder, fault = Path(sys.argv[1]), sys.argv[2]
    tensorpar.init(tensor_parallel_degree=2, timeout=timedelta(seconds=20))
    torch.manual_seed(0)
    with tensorpar.tensor_parallelism():
        config = transformers.GPT2Config(
            n_layer=2, n_embd=40, n_head=5, vocab_size=97, bos_token_id=0, eos_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts = {"model": model, "optimizer": optimizer}
    place = str(folder / "checkpoints")
    resumed = tensorpar.load_checkpoint(place, **parts)
    start = 0 if resumed is None else resumed.step
    for step in range(start, STEPS):
        strike_if(fault == "step" and step == 3, folder)
        if fault == "save" and step == 3:
            strike_while_saving(folder)
        torch.manual_seed(step)
        tokens = torch.randint(97, (2, 12))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tensorpar.save_checkpoint(place, step + 1, **parts, timeout=timedelta(seconds=20))
    model.save_pretrained(folder / "final")


def strike_if(now: bool, folder: Path) -> None:
    """Kill rank 1, once."""
    mark = folder / "struck"
    if now and tensorpar.rank() == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def strike_while_saving(folder: Path) -> None:
    """Kill rank 1 in its first write of the next checkpoint."""
    write = Checksummed.transform_to

    def struck(self: Checksummed, output: object) -> object:
        strike_if(True, folder)
        return write(self, output)

    Checksummed.transform_to = struck


if __name__ == "__main__":
    main()
