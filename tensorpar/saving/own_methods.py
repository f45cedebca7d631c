"""What a parallel Transformers model does differently when asked to save itself or to generate.

The class of such a model is its own one with these methods in front, under the same name.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tensorpar import hf_compat
from tensorpar.agreement import require_agreement
from tensorpar.collectives import all_reduce
from tensorpar.files.replacing import replacing
from tensorpar.files.uploading import push_together
from tensorpar.files.writing import write_weights
from tensorpar.gathering import TIMEOUT, annotated
from tensorpar.mesh import tp_mesh
from tensorpar.model_doors import argument_facts, generating
from tensorpar.nn.greedy import choosing_greedily
from tensorpar.nn.vocabulary import VocabParallelHead
from tensorpar.parameters import OwnMethods, mix_in
from tensorpar.promise import origin_of
from tensorpar.rendezvous import rendezvous
from tensorpar.replace import translate_functions
from tensorpar.saving.collecting import Collector


def bind(model: nn.Module) -> None:
    """Give a Transformers model that has become parallel its own `save_pretrained`, `generate`."""
    mix_in(model, SavesItself)
    if hasattr(model, "generate"):
        mix_in(model, GeneratesAlike)
        hf_compat.make_static_caches_lazily(model)


class SavesItself(OwnMethods):
    """Mixed into the class of a parallel Transformers model."""

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *,
        timeout: timedelta = TIMEOUT,
        **kwargs: Any,
    ) -> None:
        """Write an ordinary Hugging Face folder; collective over all ranks, led by rank 0.

        Ranks of its machine write their own parts. Where one is elsewhere, or sees other files, and
        under FSDP, rank 0 writes all, and holds two whole tensors at a time; the others none. The
        folder's old files are replaced when all new ones are on the disk;
        `tensorpar.files.replacing` says what a process leaves that is killed before.

        Args:
            self: the parallel model.
            save_directory: the folder; made if absent.
            timeout: how long to wait for the last rank to call this.
            kwargs: as for `PreTrainedModel.save_pretrained`: `max_shard_size`, `variant`, ...

        Raises:
            TimeoutError: a rank does not make this call in time; on all ranks that do.
            ValueError: `state_dict` or `is_main_process` is given: every rank takes part, and the
                state dict is the model's own; or `push_to_hub` or `distributed_checkpoint`.
            OSError: on rank 0, since the disk is full, or the folder cannot be written.
            RuntimeError: the same on any other rank; with what rank 0 raised. The folder is as it
                was.
        """
        _refuse(kwargs)
        rank = rendezvous("save_pretrained", timeout)
        tied = hf_compat.tied_names(self)
        own = {name: x for name, x in self.state_dict(keep_vars=True).items() if name not in tied}
        collector = Collector(own, {name: (layout, n) for name, layout, n in annotated(self)})
        if rank == 0:
            stale = hf_compat.stale_weights(kwargs.get("variant"))
            with collector.leading(), replacing(save_directory, stale) as folder:
                state_dict = _state_dict(self, collector)
                write = partial(write_weights, ahead=collector.write_ahead)
                with hf_compat.weights_written_by(write):
                    super().save_pretrained(  # type: ignore[misc]
                        folder, state_dict=state_dict, **kwargs
                    )
        else:
            collector.serve()

    def push_to_hub(
        self: Any,
        repo_id: str,
        *,
        timeout: timedelta = TIMEOUT,
        max_shard_size: int | str = "50GB",
        **kwargs: Any,
    ) -> Any:
        """Upload an ordinary Hugging Face folder; collective over all ranks, uploaded by rank 0.

        Args:
            self: the parallel model.
            repo_id: the repository.
            timeout: how long to wait for the last rank to call this.
            max_shard_size: of a file of weights.
            kwargs: as for `PreTrainedModel.push_to_hub`: `private`, `token`, `revision`, ...

        Returns:
            On rank 0 what huggingface_hub says of the commit; None on the others, which do not wait
            for the upload.

        Raises:
            TimeoutError: a rank does not make this call in time; on all ranks that do.
        """
        push = partial(super().push_to_hub, repo_id, max_shard_size=max_shard_size, **kwargs)  # type: ignore[misc]
        return push_together(self, push, timeout=timeout, max_shard_size=max_shard_size)


def _refuse(kwargs: dict[str, Any]) -> None:
    if refused := sorted({"state_dict", "is_main_process"} & set(kwargs)):
        raise ValueError(
            f"{refused} given, required: neither; call save_pretrained on every rank, rank 0 writes"
        )
    if kwargs.get("push_to_hub"):
        raise ValueError(
            "push_to_hub = True, required: False; save, and then on every rank call "
            "model.push_to_hub(repo_id), or on one of them huggingface_hub.upload_folder"
        )
    if kwargs.get("distributed_checkpoint"):
        raise ValueError(
            "distributed_checkpoint = True, required: False; torch.distributed.checkpoint saves "
            "this model's state_dict() from all ranks"
        )


def _state_dict(model: Any, collector: Collector) -> dict[str, torch.Tensor]:
    """What Transformers is to write: promises, or tensors where something must look at values."""
    promises: dict[str, torch.Tensor] = dict(collector.promises())
    functions = translate_functions(model)
    if not functions and not hf_compat.converts_weights(model):
        return promises
    whole = {name: origin_of(promise)().clone() for name, promise in promises.items()}
    for to_hf, _ in functions:
        whole = to_hf(whole)
    return whole


class GeneratesAlike(OwnMethods):
    """Mixed into the class of a parallel model that generates."""

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
            return finished(super().generate(*args, **kwargs))  # type: ignore[misc]

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin._sample`, gathering no logits where only the likeliest is taken."""
        facts = inspect.signature(super()._sample).bind(*args, **kwargs).arguments  # type: ignore[misc]
        with choosing_greedily() if _only_takes_largest(self, facts) else nullcontext():
            return super()._sample(*args, **kwargs)  # type: ignore[misc]


def _only_takes_largest(model: nn.Module, facts: Mapping[str, Any]) -> bool:
    """Whether on no rank the caller, a processor or a hook sees the logits; one all-reduce."""
    mesh, how = tp_mesh(), facts["generation_config"]
    if how.do_sample or mesh.size() == 1:
        return False
    returned = how.return_dict_in_generate and (how.output_scores or how.output_logits)
    seen = bool(returned or facts["logits_processor"] or _has_hook_on_logits(model))
    # a hook may be on one rank only, and all must gather for it
    flag = torch.tensor([seen], dtype=torch.int32, device=mesh.device_type)
    return not all_reduce(flag, mesh, dist.ReduceOp.MAX)


def _has_hook_on_logits(model: nn.Module) -> bool:
    """Whether a head, or a module around it, has a forward hook other than a door's."""
    modules = dict(model.named_modules())
    heads = [name for name, module in modules.items() if isinstance(module, VocabParallelHead)]
    around = {
        ".".join(parts[:depth])
        for parts in (name.split(".") for name in heads)
        for depth in range(len(parts) + 1)
    }
    return any(
        len(modules[name]._forward_hooks) > ("_tensorpar_door" in modules[name].__dict__)
        for name in around
    )


def _share_random_state(mesh: Any) -> None:
    states = [torch.get_rng_state()]
    if mesh.device_type == "cuda":
        states.append(torch.cuda.get_rng_state())
    dist.broadcast_object_list(states, group=mesh.get_group(), group_src=0)
    torch.set_rng_state(states[0])
    if mesh.device_type == "cuda":
        torch.cuda.set_rng_state(states[1])
