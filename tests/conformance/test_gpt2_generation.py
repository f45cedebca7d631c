"""`generate` on a parallel model: the tokens of one process, the same on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.gpt2 import Case, batch, build, perturbed

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True},
    "sampling, top k": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def generated(
    way: dict[str, Any], parallel: bool, seed: int, spread: int, padding: int = 0
) -> torch.Tensor:
    """Tokens continuing three prompts; `spread` makes the seeds of the ranks differ."""
    model = perturbed(Case(), parallel=parallel).eval()
    prompt = batch(Case())["input_ids"][:, :6]
    mask = torch.ones_like(prompt)
    mask[0, :padding] = mask[2, : padding // 2] = 0
    prompt = prompt.masked_fill(mask == 0, 96)
    rank = torch.distributed.get_rank() if parallel else 0
    torch.manual_seed(seed + spread * rank)
    return model.generate(
        prompt, attention_mask=mask, max_new_tokens=12, pad_token_id=96, eos_token_id=95, **way
    )


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_one_process(ranks, way, size):
    """Greedy, beams, sampling and every cache give one process's tokens, on every rank."""
    results = ranks(size).run(generated, WAYS[way], True, 3, 0)
    reference = generated(WAYS[way], False, 3, 0)
    assert reference.shape[1] > 6
    for tokens in results:
        assert torch.equal(tokens, reference)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", ["sampling", "sampled beams"])
def test_ranks_with_different_seeds_sample_the_same(ranks, way, size):
    """Sampling follows the first rank's seed, whatever the others' are."""
    results = ranks(size).run(generated, WAYS[way], True, 3, 1)
    reference = generated(WAYS[way], False, 3, 0)
    for tokens in results:
        assert torch.equal(tokens, reference)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", ["greedy", "static cache", "beams", "sampling"])
def test_left_padding_is_masked(ranks, way, size):
    """Left-padded prompts give one process's tokens, which are not those without a mask."""
    results = ranks(size).run(generated, WAYS[way], True, 3, 0, 4)
    reference = generated(WAYS[way], False, 3, 0, 4)
    for tokens in results:
        assert torch.equal(tokens, reference)
    model = perturbed(Case(), parallel=False).eval()
    torch.manual_seed(3)
    unmasked = model.generate(
        reference[:, :6],
        attention_mask=torch.ones(3, 6, dtype=torch.int64),
        max_new_tokens=12,
        pad_token_id=96,
        eos_token_id=95,
        **WAYS[way],
    )
    assert not torch.equal(unmasked[0], reference[0])


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


def streamed_logits(parallel: bool) -> list[torch.Tensor]:
    """Logits of decoding by hand with the model's own cache, two tokens at a time."""
    model = perturbed(Case(), parallel=parallel).eval()
    ids, cache, found = batch(Case())["input_ids"][:, :8], None, []
    with torch.no_grad():
        for start in range(0, 8, 2):
            output = model(ids[:, start : start + 2], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_decoding_by_hand_with_a_cache(ranks, size):
    """Steps that pass `past_key_values` on give one process's logits, the same on all ranks."""
    results = ranks(size).run(streamed_logits, True)
    for place, reference in enumerate(streamed_logits(False)):
        assert all(torch.equal(one[place], results[0][place]) for one in results)
        torch.testing.assert_close(results[0][place], reference, rtol=0, atol=1e-10)
