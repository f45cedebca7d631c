"""`generate` on a parallel model: the tokens of one process, the same on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.families import (
    CASES,
    IN_FLOAT32,
    PAD,
    build_causal,
    generated,
)
from tests.conformance.gpt2 import (
    Case,
    Tensors,
    batch,
    build,
    require_close,
    require_equal_ranks,
    tensors_of,
)

#: `generate` keeps logits in float32.
CLOSE = 1e-5
#: feature to the ways of generating that prove it.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "greedy decoding, dynamic cache": {
        "greedy": {"do_sample": False},
        "processed": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    },
    "decoding without a cache": {"without cache": {"do_sample": False, "use_cache": False}},
    "static cache": {
        "greedy": {"do_sample": False, "cache_implementation": "static"},
        "beams": {"do_sample": False, "cache_implementation": "static", "num_beams": 2},
        "prompt in chunks": {
            "do_sample": False,
            "cache_implementation": "static",
            "prefill_chunk_size": 4,
            "disable_compile": True,
        },
    },
    "beam search": {
        "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        "sampled beams": {"do_sample": True, "num_beams": 2},
    },
    "sampling": {
        "sampling": {"do_sample": True, "num_return_sequences": 2},
        "top k": {"do_sample": True, "top_k": 5, "temperature": 0.7},
        "top p": {"do_sample": True, "top_p": 0.8},
    },
}
#: how many of the padded rows' first tokens are padding.
LEFT_PADDED = {0: 4, 2: 2}


def prompt() -> dict[str, torch.Tensor]:
    """Three left-padded prompts."""
    ids = torch.randint(2, 97, (3, 7), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    for row, number in LEFT_PADDED.items():
        mask[row, :number] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def continued(family: str, feature: str, parallel: bool, fused: bool = False) -> Tensors:
    """Tokens and logits of every way that proves a feature; the ranks' seeds differ."""
    model = build_causal(family, parallel=parallel, fused_attention=fused).eval()
    found: Tensors = {}
    for name, way in WAYS[feature].items():
        torch.manual_seed(3 + (torch.distributed.get_rank() if parallel else 0))
        done = generated(model, prompt(), max_new_tokens=6, pad_token_id=PAD, **way)
        found |= {f"{name}/{key}": x for key, x in done.items()}
    return found


@pytest.mark.parametrize(
    ("feature", "family", "size"),
    [
        pytest.param(feature, family, size, marks=pytest.mark.feature(feature))
        for feature in WAYS
        for family in CASES
        for size in ([2, 4] if family == "gpt2" else [2])
    ],
)
def test_tokens_are_those_of_one_process(ranks, family, feature, size):
    """From left-padded prompts, whatever the ranks' seeds: the first rank's counts."""
    results = ranks(size).run(continued, family, feature, True)
    require_equal_ranks(results)
    require_close(results[0], continued(family, feature, False), CLOSE)


@pytest.mark.feature("generation with fused attention")
@pytest.mark.parametrize("family", sorted(IN_FLOAT32))
def test_generation_with_fused_attention(ranks, family):
    """Fused attention gives Transformers' tokens, and logits up to its float32 scores."""
    feature = "greedy decoding, dynamic cache"
    results = ranks(4).run(continued, family, feature, True, True)
    require_equal_ranks(results)
    require_close(results[0], continued(family, feature, False), CLOSE)


@pytest.mark.feature("left-padded prompts")
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_lost_mask_would_be_seen(ranks, family):
    """On a rank without a head too; without the mask, the padded rows' logits are others."""
    results = ranks(4).run(continued, family, "greedy decoding, dynamic cache", True)
    require_equal_ranks(results)
    masked = continued(family, "greedy decoding, dynamic cache", False)
    require_close(results[0], masked, CLOSE)
    model = build_causal(family, parallel=False).eval()
    lost = prompt() | {"attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    logits = generated(model, lost, max_new_tokens=1, do_sample=False)["logits"][0]
    for row in range(3):
        difference = (logits[row] - masked["greedy/logits"][0, row]).abs().max()
        assert bool(difference > 1e-3) == (row in LEFT_PADDED)


def assisted(family: str, parallel: bool) -> Tensors:
    """Tokens decoded with another model's guesses, and with guesses from the prompt."""
    model = build_causal(family, parallel=parallel, fused_attention=False).eval()
    helper = build_causal(family, parallel=parallel, config={"layers": 1}).eval()
    given = {"input_ids": prompt()["input_ids"][1:2].repeat(1, 2)[:, :9]}
    ways: dict[str, Any] = {
        "model": {"assistant_model": helper},
        "prompt": {"prompt_lookup_num_tokens": 2},
    }
    found = {}
    for name, way in ways.items():
        done = generated(model, given, max_new_tokens=6, do_sample=False, **way)
        found |= {f"{name}/{key}": x for key, x in done.items()}
    return found


@pytest.mark.feature("assisted decoding")
@pytest.mark.parametrize("family", sorted(CASES))
def test_assisted_decoding(ranks, family):
    """A second parallel model guesses, or the prompt does, and the tokens stay the same."""
    results = ranks(2).run(assisted, family, True)
    require_equal_ranks(results)
    require_close(results[0], assisted(family, False), CLOSE)


def contrastive(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    """Contrastive search (Su et al., 2022), of which Transformers has only the name by now.

    Each of the three likeliest tokens is tried; one is taken that is likely and unlike the past.
    """
    seen = {"use_cache": True, "output_hidden_states": True}
    output = model(input_ids, **seen)
    past, logits = output.hidden_states[-1], output.logits[:, -1]
    for _step in range(4):
        likely = logits.softmax(-1).topk(3)
        cache = output.past_key_values
        cache.batch_repeat_interleave(3)
        output = model(likely.indices.view(-1, 1), past_key_values=cache, **seen)
        new = output.hidden_states[-1]
        alike = torch.cosine_similarity(new, past.repeat_interleave(3, 0), dim=-1).amax(-1)
        best = (0.4 * likely.values.view(-1) - 0.6 * alike).view(-1, 3).argmax(-1)
        rows = best + 3 * torch.arange(len(best))
        output.past_key_values.batch_select_indices(rows)
        input_ids = torch.cat([input_ids, likely.indices.view(-1, 1)[rows]], 1)
        past, logits = torch.cat([past, new[rows]], 1), output.logits[rows, -1]
    return input_ids


def searched(family: str, parallel: bool) -> torch.Tensor:
    """Tokens of a decoding loop that is given to `generate`."""
    model = build_causal(family, parallel=parallel, fused_attention=False).eval()
    row = prompt()["input_ids"][1]
    ids = torch.stack([row, row.flip(0)])
    return model.generate(ids, custom_generate=contrastive, max_new_tokens=4)


@pytest.mark.feature("custom_generate: a decoding loop of one's own, contrastive search")
@pytest.mark.parametrize("family", sorted(CASES))
def test_a_decoding_loop_of_ones_own(ranks, family):
    """It may read hidden states, and repeat and choose rows of the cache."""
    reference = searched(family, False)
    assert all(torch.equal(found, reference) for found in ranks(2).run(searched, family, True))


def seen_while_generating(family: str, parallel: bool) -> Tensors:
    """Scores, and every step's attentions of all heads and hidden states.

    In float32: in float64 Transformers' GPT-NeoX answers nan where padding hides every key.
    """
    eager, float32 = {"attn_implementation": "eager"}, torch.float32
    model = build_causal(family, parallel=parallel, config=eager, dtype=float32).eval()
    output = model.generate(
        **prompt(),
        max_new_tokens=3,
        num_beams=2,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
    )
    return tensors_of({name: x for name, x in output.items() if name != "past_key_values"})


@pytest.mark.feature("output_scores, output_attentions and hidden states of generate")
@pytest.mark.parametrize("family", sorted(CASES))
def test_what_generate_returns(ranks, family):
    """With attentions recorded at every step, all heads of them."""
    results = ranks(2).run(seen_while_generating, family, True)
    require_equal_ranks(results)
    assert results[0]["attentions.0.0"].shape[1] == 5
    require_close(results[0], seen_while_generating(family, False), 1e-4)


def likeliest_tokens(family: str, parallel: bool) -> Tensors:
    """Greedily chosen tokens, of which nobody sees the logits, and with somebody looking."""
    model = build_causal(family, parallel=parallel).eval()
    way = {**prompt(), "max_new_tokens": 6, "pad_token_id": PAD, "do_sample": False}
    found = {"unseen": model.generate(**way)}
    found["with a cache returned"] = model.generate(**way, return_dict_in_generate=True).sequences
    looked: list[torch.Tensor] = []

    def look(_: object, __: object, output: Any) -> None:
        logits = output if isinstance(output, torch.Tensor) else output.logits
        looked.append(logits[:, -1].detach().clone())

    # on one rank only, where a look must find whole logits without the others' help
    looks = not parallel or torch.distributed.get_rank() == 0
    head = model.get_output_embeddings()
    names = next(name for name, module in model.named_modules() if module is head).split(".")
    around = {
        depth: model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)
    }
    for name, module in around.items():
        hook = module.register_forward_hook(look) if looks else None
        found[f"hook at depth {name}"] = model.generate(**way)
        if hook is not None:
            hook.remove()
    found |= {f"seen/{i}": x for i, x in enumerate(looked)}
    return found


@pytest.mark.feature("greedy decoding gathers no logits")
@pytest.mark.parametrize("family", sorted(CASES))
@pytest.mark.parametrize("size", [2, 4])
def test_likeliest_tokens_are_those_of_one_process(ranks, family, size):
    """Also where a hook looks at the logits, on one rank only."""
    reference = likeliest_tokens(family, False)
    first, *others = ranks(size).run(likeliest_tokens, family, True)
    require_close(first, reference, CLOSE)
    tokens = {name: x for name, x in reference.items() if not name.startswith("seen")}
    assert {name: x.tolist() for name, x in tokens.items()} == {
        name: first[name].tolist() for name in tokens
    }
    require_equal_ranks([{name: first[name] for name in tokens}, *others])


def trained_after_sampling() -> tuple[torch.Tensor, bool]:
    """The random state after sampling from different seeds, and whether a training step works."""
    model = build(Case(config={"resid_pdrop": 0.3}), parallel=True)
    torch.manual_seed(torch.distributed.get_rank())
    model.eval().generate(batch(Case())["input_ids"][:, :4], max_new_tokens=3, do_sample=True)
    loss = model.train()(**batch(Case())).loss
    return torch.get_rng_state(), bool(loss.isfinite())


def test_sampling_leaves_the_ranks_with_one_random_state(ranks):
    """After `generate` the ranks' random states agree, so dropout on replicas does too."""
    (first, fine), (second, too) = ranks(2).run(trained_after_sampling)
    assert torch.equal(first, second)
    assert fine
    assert too


def different_prompts() -> str:
    """What ranks with different prompts are told."""
    model = build(Case(), parallel=True).eval()
    with pytest.raises(ValueError, match="tp ranks were given different prompts") as refusal:
        model.generate(torch.full((1, 4), torch.distributed.get_rank()), max_new_tokens=2)
    return str(refusal.value)


def test_different_prompts_are_refused_on_every_rank(ranks):
    """Ranks given different prompts all raise, with both sides' facts."""
    for told in ranks(2).run(different_prompts):
        assert "on rank 0" in told
        assert "on rank 1" in told
