"""The tutorial's options: replicas of a sharded model, precision, recomputation, resuming, rows."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tensorpar
from tensorpar.sequence import SplitBlock

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 3


def losses(folder: str, degree: int, *given: str, evaluated: int = 1) -> list[float]:
    """Of every step of the script's own training, from where the folder's checkpoints stand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import train_gpt2

        patch.setattr(train_gpt2, "EVAL_EVERY", evaluated)
        if degree > 1:
            patch.setenv("TORCHELASTIC_RUN_ID", "a test")  # as torchrun does
        ids = torch.randint(97, (1000,), generator=torch.Generator().manual_seed(0))
        words = [*given, "--name=test", f"--steps={STEPS}", "--gradient-checkpointing"]
        if degree > 1:
            words += [f"--tp={degree}", "--sequence-parallel", f"--checkpoints={folder}"]
        args = train_gpt2.options(words)
        model = train_gpt2.build_model(97, args)
        found, _, held_out = train_gpt2.fit(model, ids, ids[:128].view(1, 128), args)
        if degree > 1:
            assert isinstance(model, tensorpar.DistributedModel)
            assert isinstance(model.module.transformer.h[0], SplitBlock)
            assert (tensorpar.dp_size(), tensorpar.tp_size()) == (2, 2)
        assert list(held_out) == list(range(0, STEPS + 1, evaluated))
        return found


@pytest.mark.parametrize(
    ("given", "tolerance"),
    [
        (["--data-parallel=fsdp"], 1e-4),
        (["--data-parallel=replicate", "--dtype=bfloat16"], 0.05),
    ],
)
def test_options_change_no_loss(ranks, tmp_path, given, tolerance):
    """On 2 x 2 ranks as in one process; a run that was stopped continues bit for bit."""
    (reference,) = ranks(1).run(losses, "", 1, *given)
    assert len(reference) == STEPS
    world = ranks(4, tensor_parallel_degree=2)
    whole = world.run(losses, str(tmp_path), 2, *given)
    assert whole == [whole[0]] * 4
    assert whole[0] == pytest.approx(reference, abs=tolerance)
    shutil.rmtree(tmp_path / f"step-{STEPS:09}")
    assert world.run(losses, str(tmp_path), 2, *given) == whole


def told_to_leave(folder: str, step: int) -> str:
    """What the script ends with when one rank gets a SIGTERM in a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import train_gpt2

        draw, drawn = train_gpt2.Batches.draw, []

        def draw_and_tell(batches: Any) -> torch.Tensor:
            drawn.append(None)
            if len(drawn) == step and tensorpar.rank() == 1:
                signal.raise_signal(signal.SIGTERM)
            return draw(batches)

        patch.setattr(train_gpt2.Batches, "draw", draw_and_tell)
        with pytest.raises(SystemExit) as told:
            losses(folder, 2, evaluated=STEPS)
        return str(told.value)


def test_a_sigterm_saves_and_ends(ranks, tmp_path):
    """On all ranks, after the step that one was told in; the run continues bit for bit."""
    world = ranks(4, tensor_parallel_degree=2)
    run = partial(losses, evaluated=STEPS)
    whole = world.run(run, str(tmp_path / "whole"), 2)
    told = world.run(told_to_leave, str(tmp_path / "left"), 2)
    assert told == ["told to leave, saved after step 2; run again to go on"] * 4
    assert [folder.name for folder in (tmp_path / "left").iterdir()] == ["step-000000002"]
    assert world.run(run, str(tmp_path / "left"), 2) == whole


def test_the_commands_that_it_shows(capsys):
    """Those of its first page are understood; what needs several processes says so without them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import train_gpt2

        page = train_gpt2.__doc__.replace("\\\n", " ")
        commands = re.findall(r"(\S*torchrun|python) (.*?)examples/train_gpt2.py (.*)", page)
        assert [launcher for launcher, _, _ in commands] == ["python", "torchrun", "torchrun"]
        for launcher, _, words in commands:
            with patch.context() as launched:
                if launcher == "torchrun":
                    launched.setenv("TORCHELASTIC_RUN_ID", "a test")
                args = train_gpt2.options(shlex.split(words, comments=True))
            assert args.tp == (1 if launcher == "python" else 2)
        assert args.sequence_parallel
        assert args.gradient_checkpointing
        assert (args.data_parallel, args.dtype) == ("fsdp", "bfloat16")
        with pytest.raises(SystemExit):
            train_gpt2.options(shlex.split(commands[2][2]))
        assert "need torchrun" in capsys.readouterr().err
