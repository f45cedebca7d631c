"""Stock trainers and loops: what does right is tested, what would do wrong is refused."""

from __future__ import annotations

import signal
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import tensorpar
from tests.conformance.families import build
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    refusal,
    require_close,
    require_equal_ranks,
    weights_of,
)
from tests.conformance.training import BATCH, NUM_ROWS, NUM_TESTED, announced, arguments, rows

HEAD = "BertForSequenceClassification"


def loop(accelerator: Any, kind: Any, data_ranks: int) -> Tensors:
    """What a user of accelerate writes: accumulation, clipping, a schedule, gathered metrics."""
    model = build("bert", HEAD, parallel=kind is not None)
    if data_ranks > 1:
        model = tensorpar.DistributedModel(model, data_parallel=kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    # counted in batches of one process, as accelerate wants it
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4 * data_ranks)
    train = DataLoader(rows(HEAD, NUM_ROWS, 3), BATCH // data_ranks)
    test = DataLoader(rows(HEAD, NUM_TESTED, 5), BATCH // data_ranks)
    model, optimizer, train, test, scheduler = accelerator.prepare(
        model, optimizer, train, test, scheduler
    )
    seen = []
    for _ in range(2):
        for given in train:
            with accelerator.accumulate(model):
                loss = model(**given).loss
                accelerator.backward(loss)
                # before, there are no gradients to see: FSDP2 keeps them until it reduces them
                if accelerator.sync_gradients:
                    seen.append(accelerator.clip_grad_norm_(model.parameters(), 0.5))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            seen.append(accelerator.reduce(loss.detach(), "mean"))
            seen.append(torch.tensor(scheduler.get_last_lr()[0], dtype=torch.float64))
    model.eval()
    with torch.no_grad():
        logits = [accelerator.gather_for_metrics(model(**given).logits) for given in test]
    inner = model.get_module() if isinstance(model, tensorpar.DistributedModel) else model
    found = {"seen": torch.stack(seen), "logits": torch.cat(logits)}
    return found | detached(weights_of(inner), "weight")


def loop_on_ranks(kind: str) -> Tensors:
    """With tensorpar's Accelerator."""
    from tensorpar.trainer import Accelerator

    with announced(), default_dtype(torch.float64):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        return loop(accelerator, kind, tensorpar.rdp_size())


def test_law_parity_of_an_accelerate_loop(ranks):
    """Losses, rates, norms, metrics of all rows in order, and weights equal one process's."""
    with default_dtype(torch.float64):
        AcceleratorState._reset_state(reset_partial_state=True)
        alone = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        reference = loop(alone, None, 1)
    for size, degree, kind in ((2, 2, "replicate"), (4, 2, "fsdp")):
        results = ranks(size, tensor_parallel_degree=degree).run(loop_on_ranks, kind)
        require_equal_ranks(results)
        require_close(results[0], reference, 1e-10)


def stock(folder: str) -> dict[str, str]:
    """A parallel model in the hands of Transformers' and accelerate's own classes."""
    with announced():
        model = build("bert", HEAD, parallel=True)
        args = arguments(folder)
        some = {"train_dataset": rows(HEAD, NUM_ROWS, 3), "eval_dataset": rows(HEAD, 8, 4)}
        trainer = transformers.Trainer(model=model, args=args, **some)
        told = {"train": refusal(trainer.train), "evaluate": refusal(trainer.evaluate)}
        # one that a Trainer has tried to prepare is marked as prepared
        other = build("bert", HEAD, parallel=True)
        told["prepare"] = refusal(lambda: accelerate.Accelerator(cpu=True).prepare_model(other))
        loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(rows(HEAD, 8, 3), 2))
        told["data"] = refusal(lambda: [model(**given) for given in loader])
    return told


def test_stock_classes_are_refused(ranks, tmp_path):
    """By the first step, on every rank, with what to use instead."""
    for told in ranks(2).run(stock, str(tmp_path)):
        for name in ("train", "prepare"):
            assert "DistributedDataParallel of a tensor-parallel Bert" in told[name]
            assert "those of tensorpar.trainer" in told[name]
        for name in ("evaluate", "data"):
            assert "Trainer and Accelerator of tensorpar.trainer do" in told[name]


def own_refusals(folder: str) -> dict[str, str]:
    """What our classes say to arguments that they cannot keep."""
    from tensorpar.trainer import Accelerator, Trainer

    def said(model: Any, **changes: Any) -> str:
        return refusal(lambda: Trainer(model, arguments(folder, **changes)))

    told = {}
    with announced():
        model = build("bert", HEAD, parallel=True)
        told["plain"] = said(build("bert", HEAD, parallel=False))
        for name in ("enable_jit_checkpoint", "auto_find_batch_size", "torch_compile"):
            told[name] = said(model, **{name: True})
        best = {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True}
        told["save_only_model"] = said(model, save_only_model=True, **best)
        told["accelerator_config"] = refusal(
            lambda: Trainer(
                model,
                arguments(folder, accelerator_config={"dispatch_batches": True}),
                train_dataset=rows(HEAD, NUM_ROWS, 3),
            ).train()
        )
        accelerator = Accelerator(cpu=True)
        told["objects"] = refusal(lambda: accelerator.gather_for_metrics(["text"]))
        other = build("bert", HEAD, parallel=True)
        told["averages no gradients"] = refusal(lambda: accelerator.prepare_model(other))
        loader = Trainer(
            model,
            arguments(folder, dataloader_num_workers=1),
            train_dataset=rows(HEAD, NUM_ROWS, 3),
        ).get_train_dataloader()
        assert loader.worker_init_fn.keywords["rank"] == tensorpar.rdp_rank()
    told["world"] = said(model)
    return told


def test_refusal(ranks, tmp_path):
    """A ValueError that names the argument and what it must be, before anything is trained."""
    for told in ranks(4, tensor_parallel_degree=2).run(own_refusals, str(tmp_path)):
        assert "is not tensor parallel, required" in told.pop("plain")
        assert "accelerate counts 1 processes, required: 4" in told.pop("world")
        assert "dispatch_batches = True, required: False" in told.pop("accelerator_config")
        assert "all_gather_object" in told.pop("objects")
        assert 'data_parallel="replicate" or "fsdp"' in told.pop("averages no gradients")
        for name, message in told.items():
            assert f"{name} = True" in message


def saved_by_one(folder: str) -> dict[str, str]:
    """Weights and optimizer states that torch.save wrote on the first rank, loaded on all."""
    # 8 divides: nothing would complain of shapes
    sizes = {"config": {"inner": 8, "heads": 2, "vocab": 98}}
    model = build("gpt2", "GPT2LMHeadModel", parallel=True, **sizes)
    optimizer = torch.optim.AdamW(model.parameters())
    given = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    model(**given).loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), f"{folder}/one.pt")
        torch.save(optimizer.state_dict(), f"{folder}/optimizer.pt")
    torch.save(model.state_dict(), f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()
    model.load_state_dict(torch.load(f"{folder}/{dist.get_rank()}.pt", weights_only=False))
    if dist.get_rank() == 0:
        return {}
    weights = torch.load(f"{folder}/one.pt", weights_only=False)
    told = {"weights": refusal(lambda: model.load_state_dict(weights))}
    moments = torch.load(f"{folder}/optimizer.pt", weights_only=False)
    optimizer.load_state_dict(moments)
    told["moments"] = refusal(optimizer.step)
    return told


def test_shards_of_another_rank_are_refused(ranks, tmp_path):
    """What one rank wrote by torch.save fits the others where sizes divide, and is not taken."""
    told = ranks(2).run(saved_by_one, str(tmp_path))[1]
    for message in told.values():
        assert "[(0, 2)]" in message
        assert "required: this rank's, at [(1, 2)]" in message
        assert "tensorpar.save_checkpoint" in message


def plain_loop(rank: int) -> tuple[int, Any]:
    """A loop in which one rank is signalled in the third step; when all leave it."""
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with tensorpar.preemption() as preempted:
            for step in range(1, 9):
                if step == 3 and tensorpar.rank() == rank:
                    signal.raise_signal(signal.SIGTERM)
                if preempted():
                    break
        return step, signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize("rank", [0, 1])
def test_preemption_of_a_plain_loop(ranks, rank):
    """All ranks leave in the same step, and the former handler is back."""
    assert ranks(2).run(plain_loop, rank) == [(3, signal.SIG_IGN)] * 2
