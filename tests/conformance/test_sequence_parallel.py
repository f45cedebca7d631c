"""`sequence_parallel=True`: ranks keep rows of the sequence, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

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
    probe,
)
from tests.conformance.gpt2 import (
    Tensors,
    checkpoint_activations,
    detached,
    gradients_of,
    refusal,
    require_close,
    require_equal_ranks,
    tensors_of,
    weights_of,
)
from tests.conformance.test_communication import (
    BATCH_CHECK,
    EMBEDDING,
    HEAD_BACKWARD,
    LAYERS,
    LOSS,
    PER_LAYER,
    Counts,
)

SPLIT = {"sequence_parallel": True, "fused_attention": False}
#: in the names of modules between the stream's ends.
IN_BLOCKS = (".h.", ".layer.", ".layers.")
IN_STREAM = (*IN_BLOCKS, "ln_f", "final_layer_norm")
#: beside the family's language model: a head on the last or the first position, and none.
HEADS = {"gpt2": "GPT2DoubleHeadsModel", "bert": "BertForPreTraining"}


def trained(family: str, parallel: bool, reentrant: bool | None = None) -> Tensors:
    """A training step of every head: outputs, hidden states, gradients; loss and weights after."""
    case, found = CASES[family], {}
    for head in dict.fromkeys((case.model, HEADS.get(family, case.heads[-1]))):
        options = {**SPLIT, "check_replicas_every": 1} if parallel else {}
        model = build(family, head, parallel=parallel, **options).train()
        if reentrant is not None:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = inputs(head, labels=False)
        output = model(**given, output_hidden_states=True)
        probe(output, given["attention_mask"]).backward()
        found |= detached(tensors_of(output), f"{head}/output")
        found |= detached(gradients_of(model), f"{head}/gradient")
        optimizer.step()
        loss = model(**inputs(head, labels=True)).loss
        found |= {f"{head}/loss": loss.detach().double()}
        found |= detached(weights_of(model), f"{head}/weight")
    return found


def require_alike(ours: Tensors, reference: Tensors, exact: float = EXACT) -> None:
    """Equal in float64; Transformers computes some losses in float32."""
    losses = {name for name in reference if name.endswith("/loss")}
    scale = max(1.0, *(reference[name].abs().item() for name in losses))
    for names, tolerance in ((losses, BEHIND_FLOAT32 * scale), (reference.keys() - losses, exact)):
        require_close(
            {name: x for name, x in ours.items() if (name in losses) == (names is losses)},
            {name: reference[name] for name in names},
            tolerance,
        )


@pytest.mark.feature("sequence parallelism")
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_training_step_of_one_process(ranks, family, size):
    """Nine positions over 2 and 4 ranks, one of them with none: all is as in one process."""
    results = ranks(size).run(trained, family, True)
    require_equal_ranks(results)
    require_alike(results[0], trained(family, False))


def without_a_cache(family: str) -> float:
    """Scores in float32 are rounded otherwise where no cache has laid out the keys."""
    return 100 * BEHIND_FLOAT32 if family in IN_FLOAT32 else EXACT


@pytest.mark.feature("sequence parallelism with gradient checkpointing")
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_blocks_recomputed_in_backward(ranks, family, reentrant):
    """Recomputed blocks know how their sequence is split, when the model no longer runs."""
    results = ranks(2).run(trained, family, True, reentrant)
    require_equal_ranks(results)
    require_alike(results[0], trained(family, False, reentrant), without_a_cache(family))


def norms_and_collectives(family: str) -> tuple[dict[str, set[int]], dict[str, Counts]]:
    """How many positions enter norms, and what is communicated; training, then evaluating."""
    model = build(family, CAUSAL[family], parallel=True, **SPLIT)
    seen: dict[str, set[int]] = {"training": set(), "evaluation": set()}
    stage = "training"
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and any(part in name for part in IN_STREAM):
            module.register_forward_pre_hook(lambda _, args: seen[stage].add(args[0].shape[1]))
    counts = {}
    given = inputs(CAUSAL[family], labels=True)
    with Collectives() as told:
        loss = model.train()(**given).loss
        counts["forward"] = dict(told.counts)
        told.counts.clear()
        loss.backward()
        counts["backward"] = dict(told.counts)
        told.counts.clear()
        stage = "evaluation"
        with torch.no_grad():
            model.eval()(**given)
        counts["evaluation"] = dict(told.counts)
    return seen, counts


@pytest.mark.feature("sequence parallelism: rows kept, collectives counted")
@pytest.mark.parametrize("family", sorted(CASES))
def test_rows_and_collectives(ranks, family):
    """Norms see this rank's positions; gathers and reduce-scatters in place of all-reduces."""
    layers, has_norm = PER_LAYER[family] * LAYERS, family not in ("bert", "roberta")
    forward = {
        "allreduce_": BATCH_CHECK + EMBEDDING + LOSS,
        "allgather_": layers + 1,  # and one that joins the stream
        "_reduce_scatter_base_": layers,
    }
    backward = {
        # the gradients of what a block has in common, and of the last norm
        "allreduce_": HEAD_BACKWARD + LAYERS + has_norm,
        "allgather_": layers + 1,  # and one where the stream was split
        "_reduce_scatter_base_": layers,
    }
    for rank, (seen, counts) in enumerate(ranks(2).run(norms_and_collectives, family)):
        assert seen == {"training": {(5, 4)[rank]}, "evaluation": {9}}
        assert counts["forward"] == forward
        assert counts["backward"] == backward
        assert "_reduce_scatter_base_" not in counts["evaluation"]


def masks(family: str, reentrant: bool | None) -> Tensors:
    """What every dropout outside of attention keeps, the gradients, and the next random number."""
    model = build(family, CASES[family].model, parallel=True, **SPLIT).train()
    found: Tensors = {}
    for name, module in model.named_modules():
        # a query whose only key is dropped would look like a mask of its own
        if isinstance(module, nn.Dropout) and "attn_dropout" not in name:
            module.p = 0.3

            def note(_: nn.Module, __: Any, output: torch.Tensor, name: str = name) -> None:
                if output.ndim == 3:
                    found.setdefault(f"kept/{name}", (output.detach() != 0).float())

            module.register_forward_hook(note)
    if reentrant is not None:
        checkpoint_activations(model, {"use_reentrant": reentrant})
    given = inputs(CASES[family].model, labels=False)
    torch.manual_seed(5)
    output = model(**given)
    probe(output, given["attention_mask"]).backward()
    return found | detached(gradients_of(model), "gradient") | {"next": torch.rand(2)}


@pytest.mark.feature("sequence parallelism: independent dropout masks on rows")
@pytest.mark.parametrize("family", sorted(CASES))
def test_dropout_on_rows(ranks, family):
    """Each rank draws for its own rows, all alike for what they share; recomputing draws again."""
    found = [ranks(2).run(masks, family, reentrant) for reentrant in (None, True, False)]
    for results in found[1:]:
        for plain, again in zip(found[0], results, strict=True):
            require_close(again, plain, without_a_cache(family))
    ours, theirs = found[0]
    kept = {name for name in ours if name.startswith("kept")}
    assert len(kept) >= 2
    in_blocks = {name for name in kept if any(part in name for part in IN_BLOCKS)}
    assert in_blocks
    assert kept - in_blocks
    for name in kept:
        one, other = ours[name], theirs[name]
        assert 0.6 < one.mean() < 0.8
        # GPT-J drops terms of a sum, which have all positions
        is_split = name in in_blocks and family != "gptj"
        assert (one.shape[1], other.shape[1]) == ((5, 4) if is_split else (9, 9))
        assert torch.equal(one[:, :4], other[:, :4]) != is_split
    require_equal_ranks([{n: x for n, x in result.items() if n not in kept} for result in found[0]])


def refusals() -> list[str]:
    """What cannot be combined, as it is refused before anything is changed."""

    def built(family: str, head: str, **changes: Any) -> str:
        return refusal(lambda: build(family, head, parallel=True, config=changes, **SPLIT))

    def in_one_block() -> None:
        model = build("gpt2", "GPT2Model", parallel=False)
        tensorpar.set_tensor_parallelism(model.h[1].mlp, False)
        tensorpar.parallelize(model, options=tensorpar.options.Options(sequence_parallel=True))

    torn = build("gpt2", "GPT2LMHeadModel", parallel=True, **SPLIT)
    torn.train(tensorpar.tp_rank() == 0)
    return [
        built("gpt2", "GPT2LMHeadModel", add_cross_attention=True),
        built("bert", "BertModel", chunk_size_feed_forward=3),
        refusal(in_one_block),
        refusal(lambda: torn(**inputs("LM", labels=True))),
        refusal(
            lambda: tensorpar.options.Options(sequence_parallel=True, reproducible_dropout=True)
        ),
    ]


def test_what_cannot_be_combined(ranks):
    """Each is refused with its value, what is required, and what to do."""
    for crossing, pieces, partial, modes, draws in ranks(2).run(refusals):
        assert "config.add_cross_attention = True, required: one sequence" in crossing
        assert "config.chunk_size_feed_forward = 3, required: one sequence" in pieces
        assert "GPT2MLP lies in a block" in partial
        assert "model.training" in modes
        assert "reproducible_dropout = True, required: one of them" in draws


def in_the_context() -> tuple[list[bool], list[list[int]]]:
    """Whether the configuration's default holds and is overruled; what the models generate."""
    found, tokens = [], []
    for given in ({}, {"sequence_parallel": False}):
        torch.manual_seed(1)
        with tensorpar.tensor_parallelism(**given):
            model = transformers.GPT2LMHeadModel(CASES["gpt2"].config()).train()
        found.append("_tensorpar_stream" in model.transformer.h[0].__dict__)
        for mode in (True, False):
            torch.manual_seed(2)
            drawn = model.train(mode).generate(torch.arange(2, 6)[None], max_new_tokens=5, top_k=9)
            tokens.append(drawn[0].tolist())
    return found, tokens


def test_the_configuration_has_a_default(ranks):
    """`init`'s key is the default of the context; decoding is as without, in training too."""
    results = ranks(2, sequence_parallel=True).run(in_the_context)
    for found, tokens in results:
        assert found == [True, False]
        assert tokens[:2] == tokens[2:] == results[0][1][:2]
        assert len(tokens[0]) == 9
