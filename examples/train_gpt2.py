"""Train GPT-2 tensor parallel on two processes, and see that nothing but the speed has changed.

    python examples/train_gpt2.py

runs `train` three times from one seed: in one process (plain Transformers), in one process with
half the threads (how far float32 drifts by itself), and tensor parallel under `torchrun`. It
compares the three step by step, reloads what the parallel run has saved with plain Transformers,
and fails if anything that should be equal is not. All of it runs offline: the text is the language
reference that ships inside every Python. A run by itself:

    torchrun --nproc-per-node 2 examples/train_gpt2.py --name mine --tp 2 --threads 1

The part that is about tensor parallelism is `build_model`; the rest is stock PyTorch.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from report import Run, num_parameters, peak_memory_mb, report
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2Tokenizer
from transformers.utils import logging

import tensorpar as tp
from tensorpar.translators.gpt2 import translate_state_dict_to_hf_gpt2

SEED = 0
BATCH, CONTEXT = 4, 128
PEAK_LEARNING_RATE = 1e-3
EVAL_EVERY = 20
PROMPT = "The class statement"
GREEDY = {"do_sample": False, "max_new_tokens": 40}
SAMPLED = {"do_sample": True, "max_new_tokens": 80, "top_k": 40}
Model = Any  # a Transformers model; its own annotations are too loose to be of help
T = TypeVar("T")


def build_model(vocab_size: int, tp_degree: int) -> Model:
    """A GPT-2; from one seed the same at every degree, and as Transformers alone makes it."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=CONTEXT,
        n_embd=256,
        n_layer=2,
        n_head=8,
        bos_token_id=0,
        eos_token_id=0,
        # no dropout, or the runs could not be compared: each rank draws the masks of its heads
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    if tp_degree > 1:
        tp.init(tensor_parallel_degree=tp_degree, device_type="cpu")  # where "one" runs too
    torch.manual_seed(SEED)
    with tp.tensor_parallelism() if tp_degree > 1 else nullcontext():
        return AutoModelForCausalLM.from_config(config)


def fit(
    model: Model, train_ids: torch.Tensor, held_out: torch.Tensor, args: Namespace
) -> tuple[list[float], list[float], dict[int, float]]:
    """All of it stock PyTorch; returns losses and seconds of each step, held-out losses after."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # warms up, then decays
        optimizer, PEAK_LEARNING_RATE, args.steps, pct_start=0.2, cycle_momentum=False
    )
    batches = torch.Generator().manual_seed(SEED)  # the ranks of one model are fed the same
    losses, seconds, held_out_losses = [], [], {0: evaluate(model, held_out)}
    steps = tqdm(range(1, args.steps + 1), desc=args.name, disable=not is_first(), mininterval=1)
    for step in steps:
        started = time.perf_counter()
        x = draw_batch(train_ids, batches)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        if step % EVAL_EVERY == 0 or step == args.steps:
            held_out_losses[step] = evaluate(model, held_out)
            steps.set_postfix(train=losses[-1], held_out=held_out_losses[step])
    return losses, seconds, held_out_losses


def train(args: Namespace) -> None:
    """Train from scratch and save; every rank runs all of this, the first one shows and writes."""
    torch.set_num_threads(args.threads)
    tokenizer, train_ids, held_out = read_text()
    memory_before = peak_memory_mb()
    model = build_model(len(tokenizer), args.tp)
    losses, seconds, held_out_losses = fit(model, train_ids, held_out, args)
    run = Run(
        name=args.name,
        losses=losses,
        held_out=held_out_losses,
        tokens_per_second=BATCH * CONTEXT / statistics.median(seconds),
        parameters=on_all_ranks(num_parameters(model)),
        memory_mb=on_all_ranks((memory_before, peak_memory_mb())),
        greedy=continue_prompt(model, tokenizer, **GREEDY),
    )
    save(model, tokenizer, args.out / args.name)
    if is_first():
        run.write(args.out)
    tp.shutdown()


def read_text() -> tuple[GPT2Tokenizer, torch.Tensor, torch.Tensor]:
    """A byte-level BPE trained on the spot, the training tokens, the held-out ones by context."""
    text = "<|endoftext|>".join(topics.values())
    cut = int(0.95 * len(text))
    tokenizer = GPT2Tokenizer().train_new_from_iterator(
        [text[:cut]], vocab_size=1024, show_progress=False
    )
    train_ids = torch.tensor(tokenizer(text[:cut])["input_ids"])
    held_out = torch.tensor(tokenizer(text[cut:])["input_ids"])
    return tokenizer, train_ids, held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def draw_batch(ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`[BATCH, CONTEXT]` tokens from random places."""
    starts = torch.randint(len(ids) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([ids[start : start + CONTEXT] for start in starts.tolist()])


@torch.no_grad()
def evaluate(model: Model, held_out: torch.Tensor) -> float:
    """Mean loss in nats per token."""
    model.eval()
    total = sum(model(input_ids=x, labels=x).loss.item() * len(x) for x in held_out.split(16))
    model.train()
    return float(total) / len(held_out)


def continue_prompt(model: Model, tokenizer: GPT2Tokenizer, **options: Any) -> list[int]:
    """Prompt and continuation; a parallel model's ranks all call this, and get the same tokens."""
    prompt = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(SEED)
    tokens = model.eval().generate(**prompt, **options, pad_token_id=0)
    return [int(token) for token in tokens[0]]


def save(model: Model, tokenizer: GPT2Tokenizer, folder: Path) -> None:
    """An ordinary Hugging Face folder; for a parallel model also by smdistributed's own way."""
    model.save_pretrained(folder)  # collective: every rank calls it, the first one writes
    if is_first():
        tokenizer.save_pretrained(folder)
    if tp.is_initialized():
        state_dict = tp.DistributedModel(model).state_dict()  # collective too
        if tp.rank() == 0:
            torch.save(translate_state_dict_to_hf_gpt2(state_dict), folder / "translated.pt")


def is_first() -> bool:
    return not tp.is_initialized() or tp.rank() == 0


def on_all_ranks(value: T) -> list[T]:
    """Every rank's value, in order."""
    if not tp.is_initialized():
        return [value]
    values = [value] * tp.size()
    dist.all_gather_object(values, value)
    return values


def launch(name: str, tp_degree: int, num_threads: int, args: Namespace) -> Run:
    """Run this file again, alone or under torchrun, to do one `train`; return what it wrote."""
    command = [sys.executable]
    if tp_degree > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp_degree}"]
    command += [__file__, f"--name={name}", f"--tp={tp_degree}", f"--threads={num_threads}"]
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
    parser.add_argument("--name", help="train once, under this name, in this process")
    args = parser.parse_args()
    if args.tp < 2 and args.name is None:
        parser.error(f"--tp = {args.tp}, required: at least 2")
    logging.set_verbosity_error()  # Transformers says at each run which loss GPT-2 has
    logging.disable_progress_bar()
    if args.name is None:
        return compare(args)
    train(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
