"""Train GPT-2 tensor parallel on two processes, and see that nothing but the speed has changed.

    python examples/compare_gpt2.py

runs `train_gpt2.py` three times from one seed: in one process (plain Transformers), in one process
with half the threads (how far float32 drifts by itself), and tensor parallel under `torchrun`. It
compares the three step by step, reloads what the parallel run has saved with plain Transformers,
and fails if anything that should be equal is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from corpus import read_text
from report import Run, report
from train_gpt2 import GREEDY, SAMPLED, continue_prompt, evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

SCRIPT = Path(__file__).with_name("train_gpt2.py")


def launch(name: str, tp_degree: int, num_threads: int, args: Namespace) -> Run:
    """Run the script, alone or under torchrun; return what it has measured."""
    command = [sys.executable]
    if tp_degree > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_degree}"]
    command += [str(SCRIPT), f"--name={name}", f"--tp={tp_degree}", f"--threads={num_threads}"]
    command += [f"--steps={args.steps}", f"--out={args.out}"]
    # passive: a thread that waits for another leaves its core; spinning costs 8 times the time
    # where other programs want the cores too
    environment = {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "passive"}
    code = subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
    if code:
        sys.exit(f"FAILED: the run {name} ended with exit code {code}; its output is above")
    return Run.read(args.out, name)


def compare(args: Namespace) -> int:
    """All three runs, the report, and the way back to plain Transformers."""
    started = time.perf_counter()
    one = launch("one", 1, args.threads, args)
    half = launch("one_half_threads", 1, max(1, args.threads // 2), args)
    parallel = launch(f"tp{args.tp}", args.tp, max(1, args.threads // args.tp), args)
    problems = report(one, half, parallel, args.out)
    problems += check_export(parallel, args.out / parallel.name)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if problems else 0


def check_export(run: Run, folder: Path) -> list[str]:
    """Reload the parallel run's folder as anybody would, and compare; what is wrong with it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded, trained = evaluate(model, read_text()[2]), list(run.held_out.values())[-1]
    translated = torch.load(folder / "translated.pt", weights_only=True)
    own = model.state_dict()
    greedy = continue_prompt(model, tokenizer, **GREEDY)
    checks = {
        f"held-out loss {reloaded:.6f}, when trained {trained:.6f}": abs(reloaded - trained) < 1e-5,
        f"greedy continuation, {len(run.greedy)} tokens": greedy == run.greedy,
        f"translate_state_dict_to_hf_gpt2, {len(translated)} tensors bit for bit": (
            translated.keys() == own.keys()
            and all(torch.equal(translated[key], own[key]) for key in own)
        ),
    }
    print(f"\nReloaded from {folder} with plain AutoModelForCausalLM.from_pretrained:")
    for check, passed in checks.items():
        print(f"  {'equal' if passed else 'NOT EQUAL'}: {check}")
    sampled = tokenizer.decode(continue_prompt(model, tokenizer, **SAMPLED))
    print(f"\nA sampled continuation:\n\n{sampled}\n")
    return [f"reloaded, {check}: not equal" for check, passed in checks.items() if not passed]


def main() -> int:
    parser = ArgumentParser(description="Train GPT-2 tensor parallel, and compare.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel degree")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a run")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    args = parser.parse_args()
    if args.tp < 2:
        parser.error(f"--tp = {args.tp}, required: at least 2")
    logging.set_verbosity_error()  # Transformers says at each run which loss GPT-2 has
    logging.disable_progress_bar()
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
