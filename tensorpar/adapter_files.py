"""Adapters of peft around a parallel model, to a file and back: full, in Hugging Face's layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tensorpar.files.uploading import push_together
from tensorpar.gathering import TIMEOUT, hf_layout, placed_as, tensorpar_layout, whole_tensors
from tensorpar.parameters import OwnMethods, mix_in
from tensorpar.rendezvous import rendezvous


def bind_files(model: nn.Module) -> None:
    """Give a `PeftModel` around a parallel model its own saving, and loading of full tensors."""
    if not isinstance(model, SavesAdapters):
        mix_in(model, SavesAdapters)
        model.register_load_state_dict_pre_hook(_cut_what_is_loaded)


class SavesAdapters(OwnMethods):
    """Mixed into the class of a `PeftModel` around a parallel model."""

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        *,
        timeout: timedelta = TIMEOUT,
        **kwargs: Any,
    ) -> None:
        """`PeftModel.save_pretrained`: an ordinary adapter folder; collective, written by rank 0.

        Args:
            self: peft's model around a parallel one.
            save_directory: the folder; made if absent.
            timeout: how long to wait for the last rank to call this.
            kwargs: as for `PeftModel.save_pretrained`.

        Raises:
            TimeoutError: a rank does not make this call in time; on all ranks that do.
            ValueError: `state_dict` or `is_main_process` is given: every rank takes part, and the
                state dict is the model's own.
        """
        if refused := sorted({"state_dict", "is_main_process"} & set(kwargs)):
            raise ValueError(
                f"{refused} given, required: neither; call save_pretrained on every rank, rank 0 "
                "writes"
            )
        rank = rendezvous("PeftModel.save_pretrained", timeout)
        wanted = _adapter_tensors(self, embeddings=kwargs.get("save_embedding_layers", "auto"))
        pairs = whole_tensors(wanted, keep=rank == 0)
        gathered = {name: value for name, value in pairs if rank == 0}
        if rank == 0:
            state_dict = hf_layout(self, gathered)
            super().save_pretrained(  # type: ignore[misc]
                save_directory, state_dict=state_dict, **kwargs
            )
        dist.barrier()

    def push_to_hub(self: Any, *args: Any, timeout: timedelta = TIMEOUT, **kwargs: Any) -> Any:
        """`PeftModel.push_to_hub`: collective until all have saved; rank 0 uploads and returns it.

        Raises:
            TimeoutError: a rank does not make this call in time; on all ranks that do.
        """
        push = partial(super().push_to_hub, *args, **kwargs)  # type: ignore[misc]
        return push_together(self, push, timeout=timeout)


def _adapter_tensors(model: Any, *, embeddings: bool | str) -> dict[str, torch.Tensor]:
    """What peft may save: all but the frozen model; its embeddings, should peft want them."""
    frozen = {id(p) for p in _base_parameters(model)}
    if embeddings:
        base = model.get_base_model()
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            frozen -= {id(p) for p in ([] if layer is None else layer.parameters())}
    own = model.state_dict(keep_vars=True)
    return {name: value for name, value in own.items() if id(value) not in frozen}


def _base_parameters(model: Any) -> Iterator[nn.Parameter]:
    adapters = ("lora_", "modules_to_save", "trainable_tokens")
    for name, parameter in model.named_parameters():
        if not any(part in name for part in adapters):
            yield parameter


def _cut_what_is_loaded(module: nn.Module, state_dict: Any, *_: object) -> None:
    """Full tensors of a file, in Hugging Face's layout, become this rank's shards."""
    own = module.state_dict(keep_vars=True)
    plain = {
        name: value
        for name, value in state_dict.items()
        if isinstance(own.get(name), DTensor) and not isinstance(value, DTensor)
    }
    for name, full in tensorpar_layout(module, plain).items():
        if own[name].shape == full.shape:  # of another, torch will complain
            state_dict[name] = placed_as(own[name], full)
