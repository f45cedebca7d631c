"""Train GPT-2: on one process, tensor parallel, data parallel, or both.

    python examples/train_gpt2.py --name one                      # plain Transformers
    torchrun --nproc-per-node 2 examples/train_gpt2.py --name tp2 --tp 2 --threads 1
    torchrun --nproc-per-node 4 examples/train_gpt2.py --name both --tp 2 --threads 1 \\
        --data-parallel fsdp --dtype bfloat16 --gradient-checkpointing --sequence-parallel \\
        --checkpoints out/both/run

The last one has two replicas of a model on two ranks each, and resumes where it was stopped when it
is started again. What is about parallelism is in `build_model` and `Batches`, what is about
resuming in `fit`; the rest is stock PyTorch. All of it runs offline: the text is the language
reference that ships inside every Python. `compare_gpt2.py` runs this file and compares.
"""

from __future__ import annotations

import math
import statistics
import time
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from corpus import CONTEXT, read_text
from report import Run, num_parameters, peak_memory_mb
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Tokenizer
from transformers.utils import logging

import tensorpar as tp
from tensorpar.translators.gpt2 import translate_state_dict_to_hf_gpt2

SEED, BATCH = 0, 4
PEAK_LEARNING_RATE = 1e-3
EVAL_EVERY = 20
PROMPT = "The class statement"
GREEDY = {"do_sample": False, "max_new_tokens": 40}
SAMPLED = {"do_sample": True, "max_new_tokens": 80, "top_k": 40}
Model = Any  # a Transformers model; its own annotations are too loose to be of help
T = TypeVar("T")


def build_model(vocab_size: int, args: Namespace) -> Model:
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
    parallel = dist.is_torchelastic_launched()
    if parallel:
        tp.init(tensor_parallel_degree=args.tp, device_type="cpu")  # where "one" runs too
    torch.manual_seed(SEED)
    split = tp.tensor_parallelism(sequence_parallel=args.sequence_parallel)
    with split if parallel else nullcontext():
        model = AutoModelForCausalLM.from_config(config)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if not parallel:
        return model
    replicas = args.data_parallel if tp.dp_size() > 1 else None
    return tp.DistributedModel(model, data_parallel=replicas)


class Batches:
    """Endless training batches from random places; where it stands is part of a checkpoint."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        self.generator = torch.Generator().manual_seed(SEED)

    def draw(self) -> torch.Tensor:
        """Tokens `[rows, CONTEXT]`: replicas share the rows of a batch, the ranks of one have all.

        Every rank draws all BATCH rows, so that a run may continue on any number of ranks.
        """
        starts = torch.randint(len(self.ids) - CONTEXT, (BATCH,), generator=self.generator)
        rows = torch.stack([self.ids[start : start + CONTEXT] for start in starts.tolist()])
        return rows.chunk(tp.dp_size())[tp.dp_rank()] if tp.is_initialized() else rows

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def fit(
    model: Model, train_ids: torch.Tensor, held_out: torch.Tensor, args: Namespace
) -> tuple[list[float], list[float], dict[int, float]]:
    """Returns losses and seconds of each step, held-out losses after; resumes if it can."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # warms up, then decays
        optimizer, PEAK_LEARNING_RATE, args.steps, pct_start=0.2, cycle_momentum=False
    )
    batches = Batches(train_ids)
    state = {"model": model, "optimizer": optimizer, "scheduler": schedule, "dataloader": batches}
    resumed = tp.load_checkpoint(args.checkpoints, **state) if args.checkpoints else None
    done = resumed.step if resumed else 0
    history = resumed.user_content if resumed else ([], {0: evaluate(model, held_out)})
    losses, held_out_losses = history
    # parameters and the optimizer's state stay float32
    precision = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")
    seconds = []
    steps = range(done + 1, args.steps + 1)
    with tp.preemption() if args.checkpoints else nullcontext(lambda: False) as preempted:
        for step in (bar := tqdm(steps, desc=args.name, disable=not is_first(), mininterval=1)):
            started = time.perf_counter()
            x = batches.draw()
            with precision:
                loss = model(input_ids=x, labels=x).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
            losses.append(statistics.fmean(on_all_ranks(loss.item())))  # replicas have as many rows
            leaving = preempted()
            if evaluates := step % EVAL_EVERY == 0 or step == args.steps:
                held_out_losses[step] = evaluate(model, held_out)
                bar.set_postfix(train=losses[-1], held_out=held_out_losses[step])
            if args.checkpoints and (evaluates or leaving):
                tp.save_checkpoint(args.checkpoints, step, **state, user_content=history)
            if leaving:
                raise SystemExit(f"told to leave, saved after step {step}; run again to go on")
    return losses, seconds, held_out_losses


def train(args: Namespace) -> None:
    """Train and save; every rank runs all of this, the first one shows and writes."""
    torch.set_num_threads(args.threads)
    tokenizer, train_ids, held_out = read_text()
    memory_before = peak_memory_mb()
    model = build_model(len(tokenizer), args)
    losses, seconds, held_out_losses = fit(model, train_ids, held_out, args)
    run = Run(
        name=args.name,
        losses=losses,
        held_out=held_out_losses,
        tokens_per_second=BATCH * CONTEXT / statistics.median(seconds or [math.nan]),
        parameters=on_all_ranks(num_parameters(model)),
        memory_mb=on_all_ranks((memory_before, peak_memory_mb())),
        greedy=continue_prompt(model, tokenizer, **GREEDY),
    )
    save(model, tokenizer, args.out / args.name)
    if is_first():
        run.write(args.out)
    tp.shutdown()


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
        state_dict = model.state_dict()  # collective too
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


def options(words: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(
        description="Train GPT-2, under torchrun on as many ranks as it starts."
    )
    parser.add_argument("--name", required=True, help="of the run, and of its folder in --out")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for all results")
    steps = "of the whole learning-rate schedule; a run that is resumed keeps its number"
    parser.add_argument("--steps", type=int, default=200, help=steps)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree")
    parser.add_argument("--data-parallel", choices=["fsdp", "replicate"], default="fsdp")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument(
        "--checkpoints", help="folder or URL to resume from; SIGTERM saves and ends"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each rank")
    args = parser.parse_args(words)
    if not dist.is_torchelastic_launched() and (
        args.tp > 1 or args.checkpoints or args.sequence_parallel
    ):
        parser.error(
            "--tp, --checkpoints and --sequence-parallel need torchrun --nproc-per-node ..."
        )
    return args


def main() -> None:
    args = options()
    logging.set_verbosity_error()  # Transformers says at each run which loss GPT-2 has
    logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
