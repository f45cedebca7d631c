"""The guard: every so many forwards, whether what tp ranks must have in common still is.

Compared are the random state, replicated parameters, the model's inputs (in `generate` the tokens
that were sampled), the activations that enter each layer's doors and a sharded head, and the
outputs. Each is reduced to one number where it lies; the numbers are compared by one tiny
all-reduce at the forward's end, or in `generate`, where ranks that sampled different tokens may
stop at different steps, at the entrance of the next forward. Nothing that ranks disagree on changes
how many collectives they call in between, so all ranks arrive, and all raise.

When it is off nothing here runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tensorpar.agreement import differing
from tensorpar.parameters import local, shard_dim

#: what to do about the first thing that differs, by its kind.
ADVICE = {
    "random state": "something drew random numbers on some ranks only; call torch.manual_seed "
    "alike on all tp ranks, and draw for one rank from a torch.Generator of its own",
    "parameter": "something wrote to it on some ranks only; restart from the last checkpoint, "
    "and change replicated parameters alike on all tp ranks",
    "tokens": "they were changed on some ranks after they were sampled; sample and edit tokens "
    "alike on all tp ranks",
    "input": "feed all tp ranks the same batch; shard data by dp_rank",
    "activation": "what runs before this module, and after those checked before it, differs: "
    "look for hooks, branches on the rank, or kernels that are not deterministic",
    "output": "what runs after the last layer differs: look for hooks, branches on the rank, or "
    "kernels that are not deterministic",
}


class DivergenceError(RuntimeError):
    """Replicas differ between tensor-parallel ranks; raised on all of them."""


@dataclass(frozen=True)
class Fact:
    """Something that ranks must have in common.

    Attributes:
        kind: a key of `ADVICE`.
        name: which of that kind.
        shape: of the tensor.
        print: its fingerprint, an int64 scalar on its device.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    print: Tensor


@dataclass
class Notes:
    """The facts of one forward, in order of execution."""

    paths: Mapping[object, str]
    facts: list[Fact] = field(default_factory=list)

    def add(self, kind: str, name: str, tensor: Tensor) -> None:
        """Note a tensor; storage that does not exist is not compared."""
        if not tensor.is_meta:
            self.facts.append(Fact(kind, name, tuple(tensor.shape), fingerprint(tensor)))


@dataclass
class Generation:
    """What one `generate` has noted and not compared yet, and a running print of all its tokens."""

    facts: list[Fact] = field(default_factory=list)
    tokens: Tensor | None = None


_notes: ContextVar[Notes | None] = ContextVar("guard_notes", default=None)
_generation: ContextVar[Generation | None] = ContextVar("guarded_generation", default=None)


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 scalar made of every bit and place of a tensor, on its device; nothing waits.

    A tensor with one element changed always has another.
    """
    values = local(tensor.detach())
    if values.is_complex():
        values = torch.view_as_real(values)
    values = values.contiguous().flatten()
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = values.view(kinds[values.element_size()]).to(torch.int64)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    # odd, so that no difference in one element is lost modulo 2 ** 64
    return (bits * ((places * 0x1E3779B97F4A7C15) | 1)).sum()


def guarding() -> bool:
    """Whether a forward that is being checked is under way."""
    return _notes.get() is not None


def note_activation(module: object, name: str, value: Tensor) -> None:
    """A replicated tensor enters a module; noted only while a forward is being checked."""
    notes = _notes.get()
    if notes is not None and module in notes.paths:
        notes.add("activation", f"{name} entering {notes.paths[module] or 'the model'}", value)


@contextmanager
def guarded_generation() -> Iterator[None]:
    """Within: forwards belong to one `generate`."""
    token = _generation.set(Generation())
    try:
        yield
    finally:
        _generation.reset(token)


class Guard:
    """Checks one model's forwards.

    Args:
        model: the model that is called.
        mesh: the tp mesh; data-parallel ranks may differ.
        every: check the first forward and every so many after it; 0 for never.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, every: int) -> None:
        self.mesh = mesh
        self.every = every if mesh.size() > 1 else 0
        self._name = type(model).__name__
        self._num_forwards = 0

    def enter(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        """At an outermost forward's entrance; in `generate`, compare what has been noted.

        Raises:
            DivergenceError: what must be the same on all ranks is not; on all ranks.
        """
        if not self.every:
            return
        is_due = self._num_forwards % self.every == 0
        paths: dict[object, str] = {}
        if is_due:
            paths = {module: path for path, module in model.named_modules()}
        notes = Notes(paths)
        self._num_forwards += 1
        generation = _generation.get()
        if generation is not None:
            _add_tokens(generation, given)
            notes.facts, generation.facts = generation.facts, []
        if is_due:
            _note_entrance(notes, model, given, generation)
        if generation is not None and notes.facts:
            self.compare(notes.facts)
            notes.facts = []
        _notes.set(notes if is_due else None)

    def leave(self, output: Any) -> None:
        """At an outermost forward's end, after an exception too (`output` is None then).

        Raises:
            DivergenceError: as `enter` does.
        """
        notes = _notes.get()
        if notes is None:
            return
        _notes.set(None)
        if output is None:
            return
        for name, value in output.items() if isinstance(output, Mapping) else ():
            if isinstance(value, Tensor) and not isinstance(value, DTensor):
                notes.add("output", name, value)
        _note_random_state(notes, "after the forward")
        generation = _generation.get()
        if generation is None:
            self.compare(notes.facts)
        else:
            generation.facts = notes.facts

    def finish_generation(self, output: Any) -> Any:
        """At the end of `generate`: compare what it returns; `output`.

        Raises:
            DivergenceError: as `enter` does.
        """
        generation = _generation.get()
        if not self.every or generation is None:
            return output
        notes = Notes({}, generation.facts)
        tokens = output if isinstance(output, Tensor) else output.sequences
        notes.add("tokens", "that generate returns", tokens)
        self.compare(notes.facts)
        return output

    def compare(self, facts: list[Fact]) -> None:
        """Raise on all ranks unless they have noted the same; one small all-reduce.

        Raises:
            DivergenceError: naming the first fact that differs.
        """
        prints = [fact.print.to(self.mesh.device_type) for fact in facts]
        numbers = torch.stack(prints).tolist() if prints else []
        told = {
            f"{fact.kind}: {fact.name} (fact {place})": f"{list(fact.shape)} {number:x}"
            for place, (fact, number) in enumerate(zip(facts, numbers, strict=True))
        }
        found = differing(told, self.mesh)
        if not found:
            return
        first, values = next(iter(found.items()))
        kind, name = first.split(": ", 1)
        name = name.rpartition(" (fact ")[0]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        raise DivergenceError(
            f"tp ranks have diverged at forward {self._num_forwards} of {self._name}: the {kind} "
            f"{name} is not the same on tp ranks {odd} as on rank 0, and {len(found) - 1} "
            f"of the things checked after it differ too; {ADVICE[kind]}"
        )


def _add_tokens(generation: Generation, given: Mapping[str, Any]) -> None:
    """Tokens of every forward count, so that what an unchecked one was fed is not missed."""
    for value in given.values():
        if isinstance(value, Tensor) and value.dtype == torch.int64:
            before = 0 if generation.tokens is None else generation.tokens * 31
            generation.tokens = fingerprint(value) + before


def _note_entrance(
    notes: Notes, model: nn.Module, given: Mapping[str, Any], generation: Generation | None
) -> None:
    _note_random_state(notes, "at the entrance")
    for name, parameter in model.named_parameters():
        if shard_dim(parameter) is None:
            notes.add("parameter", name, parameter)
    if generation is not None and generation.tokens is not None:
        notes.add("tokens", "that the model is fed", generation.tokens)
    for name, value in given.items():
        if isinstance(value, Tensor) and not isinstance(value, DTensor):
            notes.add("input", name, value)


def _note_random_state(notes: Notes, when: str) -> None:
    notes.add("random state", f"of torch {when}", torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        notes.add("random state", f"of torch.cuda {when}", torch.cuda.get_rng_state())
