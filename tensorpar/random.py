"""Random numbers: one common stream for what is replicated, one per rank for what is sharded.

The common stream is torch's default generator, kept alike on all tensor-parallel ranks by seeding
them alike. Where activations are sharded (inside a layer's doors) dropout must differ between
ranks; there the default generator is forked: a seed drawn from the common stream and mixed with
the rank. No state is kept between steps, so `torch.manual_seed` governs every draw, activation
checkpointing replays both streams, and a checkpoint of the default generators is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tensorpar.compiling import runs_uncompiled

_MASK = (1 << 64) - 1


def mix(seed: int, rank: int) -> int:
    """A 63-bit seed for `rank`, independent in all bits of its neighbours'.

    The finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators",
    2014). All bits must be good: torch's CPU generator keeps the lower 32 only.
    """
    x = (seed + 0x9E3779B97F4A7C15 * (rank + 1)) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return (x ^ (x >> 31)) >> 1


def draw_seed() -> int:
    """One 63-bit number from the common stream, which advances alike on all ranks."""
    return int(torch.randint((1 << 63) - 1, (), device="cpu"))


class Fork:
    """The default generators, replaced by this rank's own stream between `enter` and `leave`.

    `leave` without `enter` does nothing, so the door that opened a fork may close it again after
    a layer inside has.

    Args:
        parts_tensor_parallel_ranks: whether the ranks that share a model get a stream each; False
            where all of them take the same, another than data-parallel ranks'.
    """

    def __init__(self, *, parts_tensor_parallel_ranks: bool = True) -> None:
        self._parts = parts_tensor_parallel_ranks
        self._saved: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def enter(self, rank: int) -> None:
        """Switch to the stream of `rank`; the common stream advances by one draw.

        Does nothing inside the fork, so that each of several layers may open it.
        """
        if self._saved is None:
            self._enter(rank)

    @runs_uncompiled
    def _enter(self, rank: int) -> None:
        seed = mix(draw_seed(), rank)
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._saved = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        if self._parts:
            _entered.append(self)

    def leave(self) -> None:
        """Return to the common stream where `enter` left it."""
        if self._saved is not None:
            self._leave(*self._saved)

    @runs_uncompiled
    def _leave(self, cpu: torch.Tensor, cuda: torch.Tensor | None) -> None:
        self._saved = None
        if self._parts:
            _entered.remove(self)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    @runs_uncompiled
    def exchange(self) -> None:
        """Step out of an entered fork, or back in; each stream goes on where it was left."""
        assert self._saved is not None
        cpu, cuda = self._saved
        self._saved = torch.get_rng_state(), None if cuda is None else torch.cuda.get_rng_state()
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    def __deepcopy__(self, memo: object) -> Fork:
        """A copied module starts outside its doors."""
        return Fork(parts_tensor_parallel_ranks=self._parts)


#: forks that are entered and give tensor-parallel ranks a stream each, the innermost last.
_entered: list[Fork] = []


@contextmanager
def common_stream() -> Iterator[None]:
    """Within: draws are the same on all tensor-parallel ranks, inside a fork too."""
    fork = _entered[-1] if _entered else None
    if fork is not None:
        fork.exchange()
    try:
        yield
    finally:
        if fork is not None:
            fork.exchange()
