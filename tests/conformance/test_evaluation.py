"""Evaluation with labels: the loss comes from shards, logits are whole or stay where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor, Shard

import tensorpar
from tests.collectives import Collectives
from tests.conformance.families import (
    BEHIND_FLOAT32,
    CASES,
    CAUSAL,
    EXACT,
    IN_FLOAT32,
    build,
    inputs,
)
from tests.conformance.gpt2 import (
    Tensors,
    default_dtype,
    detached,
    gradients_of,
    require_close,
    require_equal_ranks,
    scale_of,
    tensors_of,
)
from tests.conformance.training import announced, arguments, make

#: of a `Trainer`'s evaluation; it gathers their losses itself.
NUM_BATCHES = 2
MASKED = {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}
#: a class whose outputs are not sharded, and one with two of them where the family has it.
OTHERS = {
    "gpt2": ("GPT2DoubleHeadsModel", "GPT2ForSequenceClassification"),
    "bert": ("BertForPreTraining", "BertForSequenceClassification"),
    "roberta": ("RobertaForTokenClassification",),
    "gptj": ("GPTJForQuestionAnswering",),
    "gptneo": ("GPTNeoForSequenceClassification",),
}


def heads_of(family: str) -> list[str]:
    return [CAUSAL[family], *filter(None, [MASKED.get(family)]), *OTHERS.get(family, ())]


def evaluated(family: str, parallel: bool, **options: Any) -> Tensors:
    """Outputs with labels in eval, as dict and tuple, and the gradients of loss and logits."""
    found: Tensors = {}
    for head in heads_of(family):
        model = build(family, head, parallel=parallel, **options).eval()
        given = inputs(head, labels=True)
        with torch.no_grad():
            output = model(**given)
            as_tuple = model(**given, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert type(as_tuple[1]) is type(output.to_tuple()[1])
        whole = {name: _whole(value) for name, value in tensors_of(output).items()}
        found |= detached(whole | {"second": _whole(as_tuple[1])}, head)
        output = model(**given)
        logits = {name: _whole(x) for name, x in tensors_of(output).items() if "logits" in name}
        weights = torch.linspace(-1, 1, 97, dtype=torch.float64)
        (output.loss + sum((x * weights[: x.shape[-1]]).sum() for x in logits.values())).backward()
        found |= detached(gradients_of(model), f"{head} gradient")
    model = build(family, CAUSAL[family], parallel=parallel, **options).eval()
    with torch.no_grad():
        output = model(**inputs(CAUSAL[family], labels=True), num_items_in_batch=torch.tensor(5))
    found[f"{CAUSAL[family]}, loss by the number of items"] = output.loss.detach()
    return found


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def kinds_and_gathers(family: str, gather_logits: bool) -> dict[str, Any]:
    """What logits are for each class, and how often anything was gathered."""
    found = {}
    for head in heads_of(family):
        model = build(family, head, parallel=True, gather_logits=gather_logits).eval()
        with torch.no_grad(), Collectives() as seen:
            output = model(**inputs(head, labels=True))
        gathers = sum(number for call, number in seen.counts.items() if "gather" in call)
        sharded = [x for x in output.values() if isinstance(x, DTensor)]
        assert all(x.placements == (Shard(x.ndim - 1),) for x in sharded)
        found[head] = len(sharded), gathers
    return found


@pytest.mark.feature("evaluation with labels, logits whole or left sharded")
@pytest.mark.parametrize("family", sorted(CASES))
def test_evaluation_with_labels(ranks, family):
    """Loss, logits and gradients are one process's either way; sharded logits cost no gather."""
    reference = evaluated(family, False)
    language = {CAUSAL[family], MASKED.get(family), "GPT2DoubleHeadsModel", "BertForPreTraining"}
    for gather_logits in (True, False):
        results = ranks(2).run(evaluated_so, family, gather_logits)
        require_equal_ranks(results)
        for head in heads_of(family):
            ours, theirs = _of(head, results[0]), _of(head, reference)
            in_float32 = family in IN_FLOAT32 or theirs[f"{head}/loss"].dtype == torch.float32
            tolerance = BEHIND_FLOAT32 * scale_of(theirs) if in_float32 else EXACT
            require_close(ours, theirs, tolerance)
        for found in ranks(2).run(kinds_and_gathers, family, gather_logits):
            for head, counts in found.items():
                is_sharded = head in language
                expected = (0, int(is_sharded)) if gather_logits else (int(is_sharded), 0)
                assert counts == expected, head


def _of(head: str, found: Tensors) -> Tensors:
    return {name: value for name, value in found.items() if name.startswith(head)}


def evaluated_so(family: str, gather_logits: bool) -> Tensors:
    return evaluated(family, True, gather_logits=gather_logits)


def losses_alone(trainer: type, folder: str) -> tuple[Tensors, list[int]]:
    """Losses that `Trainer.evaluate` returns without predictions, and what was gathered."""
    found, gathers = {}, []
    for smoothing in (0.0, 0.1):
        more = {"label_smoothing_factor": smoothing, "prediction_loss_only": True}
        run = make(trainer, "gpt2", "GPT2LMHeadModel", arguments(folder, **more))
        with Collectives() as seen:
            found[f"smoothing {smoothing}"] = torch.tensor(run.evaluate()["eval_loss"])
        gathers.append(sum(number for call, number in seen.counts.items() if "gather" in call))
        # and whole again, when it is over
        with torch.no_grad():
            output = run.model.eval()(**inputs("LM", labels=True))
        assert type(output.logits) is torch.Tensor
    return detached(found, "loss"), gathers


def losses_on_ranks(folder: str) -> tuple[Tensors, list[int]]:
    from tensorpar.trainer import Trainer

    with announced(), default_dtype(torch.float64):
        assert tensorpar.tp_size() == 2
        return losses_alone(Trainer, folder)


def test_a_trainer_that_wants_losses_alone_gathers_nothing(ranks, tmp_path: Path):
    """`prediction_loss_only` leaves logits sharded; a smoothed loss, made of logits, needs them."""
    with default_dtype(torch.float64):
        reference, _ = losses_alone(transformers.Trainer, str(tmp_path / "one"))
    for found, (plain, smoothed) in ranks(2).run(losses_on_ranks, str(tmp_path / "ranks")):
        require_close(found, reference, BEHIND_FLOAT32)
        assert smoothed - plain == NUM_BATCHES
