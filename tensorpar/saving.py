"""What a parallel Transformers model does differently when asked to save itself or to generate.

The class of a Transformers model is never changed; these are bound to the instance instead.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tensorpar import hf_compat
from tensorpar.agreement import require_agreement
from tensorpar.bound import Bound
from tensorpar.gathering import TIMEOUT, hf_layout, whole_tensors
from tensorpar.mesh import tp_mesh
from tensorpar.model_doors import argument_facts, generating
from tensorpar.rendezvous import rendezvous
from tensorpar.replace import translate_functions


def bind(model: nn.Module) -> None:
    """Give a Transformers model that has become parallel its own `save_pretrained`, `generate`."""
    model.__dict__["save_pretrained"] = Bound(save_pretrained, model)
    if hasattr(model, "generate"):
        model.__dict__["generate"] = Bound(generate, model)
        hf_compat.make_static_caches_lazily(model)


def save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    *,
    timeout: timedelta = TIMEOUT,
    **kwargs: Any,
) -> None:
    """Write an ordinary Hugging Face folder; collective over all ranks, written by rank 0.

    Args:
        self: the parallel model.
        save_directory: the folder; made if absent.
        timeout: how long to wait for the last rank to call this.
        kwargs: as for `PreTrainedModel.save_pretrained`.

    Raises:
        TimeoutError: a rank does not make this call in time; on all ranks that do.
        ValueError: `state_dict` or `is_main_process` is given: every rank takes part, and the
            state dict is the model's own.
    """
    if refused := sorted({"state_dict", "is_main_process"} & set(kwargs)):
        raise ValueError(
            f"{refused} given, required: neither; call save_pretrained on every rank, rank 0 writes"
        )
    rank = rendezvous("save_pretrained", timeout)
    state_dict = hf_state_dict(self, keep=rank == 0)
    if rank == 0:
        type(self).save_pretrained(self, save_directory, state_dict=state_dict, **kwargs)
    dist.barrier()


def hf_state_dict(model: Any, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """The full state dict as Hugging Face writes it: its layout, tied parameters once.

    Collective. Ranks with `keep=False` only take part and get an empty dict.
    """
    tied = hf_compat.tied_names(model)
    own = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied
    }
    gathered = {name: value for name, value in whole_tensors(own, keep=keep) if keep}
    out = {name: value.contiguous() for name, value in hf_layout(model, gathered).items()}
    for to_hf, _ in translate_functions(model) if keep else ():
        out = to_hf(out)
    return out


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate` on all tensor-parallel ranks: the same tokens on each.

    The first rank's random state is used by all, whatever their seeds; it also is what they are
    left with, so that later dropout on replicated activations agrees.

    Raises:
        ValueError: the ranks' arguments differ; on every rank.
        DivergenceError: under `check_replicas_every`, the ranks' tokens or models do.
    """
    mesh = tp_mesh()
    given = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
    require_agreement(
        argument_facts(given, content=True), mesh, "tp ranks were given different prompts"
    )
    if mesh.size() > 1:
        _share_random_state(mesh)
    with generating(self) as finished:
        return finished(type(self).generate(self, *args, **kwargs))


def _share_random_state(mesh: Any) -> None:
    states = [torch.get_rng_state()]
    if mesh.device_type == "cuda":
        states.append(torch.cuda.get_rng_state())
    dist.broadcast_object_list(states, group=mesh.get_group(), group_src=0)
    torch.set_rng_state(states[0])
    if mesh.device_type == "cuda":
        torch.cuda.set_rng_state(states[1])
