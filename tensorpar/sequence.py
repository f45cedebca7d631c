"""Sequence parallelism: between parallel regions, each rank keeps some rows of the sequence.

1. The stream is split before the first block, after the embeddings and their dropout, and whole
   again after the model's last norm (BERT: after the last block): what Transformers does before and
   after, with shapes, masks, positions and heads, is done on whole sequences, as ever.
2. Blocks are handed `[batch, rows, hidden]`, and masks and positions whole. A region's door gathers
   the rows, so that attention sees all keys and queries; its row layer scatters the sum.
3. That doors and layers must do so is said by `tensorpar.rows`, which a block sets for as long as
   its forward runs. It travels as an argument of the forward, so that a block that is recomputed
   in backward, when the model's forward is long over, knows it too, in whatever thread.
4. Replicated parameters that see rows only sum their gradients over ranks, those of a block by one
   all-reduce: see `tensorpar.region`.
5. Dropout on rows draws from each rank's own stream of random numbers, forked for that call.
6. Rows are chunks as `Shard` cuts a dim: lengths need not divide, and a rank may have no row.
7. Hidden states that Transformers records are rows, marked, and joined at the model's door.
8. Each forward decides by itself: in training with gradients it is split. Evaluation and decoding
   are not: they keep nothing, and a token cannot be split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tensorpar import hf_compat
from tensorpar.nn.linear import ColumnParallel
from tensorpar.options import Options
from tensorpar.parameters import mix_in
from tensorpar.random import Fork
from tensorpar.region import inside_region, summing_together
from tensorpar.registry import Plan, Replacement, Stream, find
from tensorpar.rows import Rows, Splitting, current_rows


class StreamDoor:
    """Where one model's stream of activations is split and joined.

    Args:
        mesh: the tp mesh.
        joins: whether the stream ends with the model's forward, no norm following the last block.
    """

    def __init__(self, mesh: DeviceMesh, *, joins: bool) -> None:
        self.mesh = mesh
        self.fork = Fork()
        self.rows: Rows | None = None
        self._joins = joins
        self._splits: bool | None = None

    @classmethod
    def hang(cls, owner: nn.Module, stream: Stream, mesh: DeviceMesh) -> None:
        """Split the stream of `owner`, which lists the blocks and has been made parallel."""
        norm = None if stream.norm is None else owner.get_submodule(stream.norm)
        door = cls(mesh, joins=norm is None)
        owner.register_forward_pre_hook(door.begin, prepend=True)
        owner.register_forward_hook(door.end, always_call=True)
        for place, block in enumerate(owner.get_submodule(stream.blocks).children()):
            mix_in(block, SplitBlock)
            block.__dict__.update(_tensorpar_stream=door, _tensorpar_is_first=place == 0)
            for module in block.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.register_forward_pre_hook(door.draw_own)
                    module.register_forward_hook(door.draw_common, always_call=True)
        if norm is not None:
            mix_in(norm, LastNorm)
            norm.__dict__["_tensorpar_stream"] = door

    def begin(self, owner: nn.Module, *_: object) -> None:
        """Forward pre-hook of the owner: is this forward split? Ranks must decide alike."""
        self.rows, self._splits = None, owner.training and torch.is_grad_enabled()

    def end(self, _owner: nn.Module, _args: object, output: Any) -> Any:
        """Forward hook of the owner, run after an exception too."""
        rows, self.rows, self._splits = self.rows, None, None
        if rows is None or output is None or not self._joins:
            return output
        return _with_first(output, rows.join(_first(output)))

    def arguments(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A block's arguments: with the stream split, if it is the first, and how it is split.

        Raises:
            RuntimeError: in training, its model's forward is not under way.
        """
        if self._splits is None and block.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(block).__name__} runs outside its model's forward, required under "
                "sequence_parallel = True: inside, where it is known how the sequence is split; to "
                "recompute activations, call model.gradient_checkpointing_enable()"
            )
        if not self._splits:
            return args, kwargs
        if block.__dict__["_tensorpar_is_first"]:
            stream, *rest = args
            self.rows = Rows(self.mesh, stream.shape[1])
            args = self.rows.split(stream), *rest
        return args, {**kwargs, "tensorpar_rows": self.rows}

    def draw_own(self, dropout: Any, _args: object) -> None:
        """Forward pre-hook of a dropout: ranks have different rows."""
        draws = dropout.training and dropout.p > 0
        if draws and current_rows() is not None and not inside_region():
            self.fork.enter(self.mesh.get_local_rank())

    def draw_common(self, *_: object) -> None:
        """Forward hook of a dropout, run after an exception too."""
        self.fork.leave()


class SplitBlock:
    """Mixed into the class of a block: its forward runs on rows.

    A call and not a hook, since some versions of Transformers recompute a block with its hooks.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block, on the stream split or as it is."""
        door: StreamDoor = self.__dict__["_tensorpar_stream"]
        args, kwargs = door.arguments(self, args, kwargs)  # type: ignore[arg-type]
        rows: Rows | None = kwargs.get("tensorpar_rows")
        with Splitting(rows):  # its hooks are to know, too
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if rows is not None:
            rows.mark(_first(output))  # it need not be what its forward has returned
        return output

    def forward(self, *args: Any, tensorpar_rows: Rows | None = None, **kwargs: Any) -> Any:
        """The class's own forward."""
        with Splitting(tensorpar_rows), summing_together(self):  # type: ignore[arg-type]
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if tensorpar_rows is not None:
            tensorpar_rows.mark(args[0])
            tensorpar_rows.mark(_first(output))
        return output


class LastNorm:
    """Mixed into the class of the norm after the last block: takes rows, returns all of them."""

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """The class's own forward, and the stream whole again."""
        door: StreamDoor = self.__dict__["_tensorpar_stream"]
        with Splitting(door.rows), summing_together(self):  # type: ignore[arg-type]
            output: torch.Tensor = super().forward(stream)  # type: ignore[misc]
        return output if door.rows is None else door.rows.join(output)


def _first(output: Any) -> torch.Tensor:
    first: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return first


def _with_first(output: Any, first: torch.Tensor) -> Any:
    """`output` with another first tensor: a tensor, a tuple or a `ModelOutput`."""
    if isinstance(output, dict):
        output[next(iter(output))] = first
        return output
    return first if isinstance(output, torch.Tensor) else (first, *output[1:])


def require_splittable(model: nn.Module, chosen: Mapping[nn.Module, Options]) -> None:
    """Raise, before anything is changed, where `sequence_parallel` cannot be had.

    Args:
        model: about to become parallel.
        chosen: the options of each module in it.

    Raises:
        ValueError: a model attends to another's sequence or computes it in pieces; no module says
            where the stream begins and ends; or a block holds what does not know of rows.
    """
    asked = [module for module, own in chosen.items() if own.enabled and own.sequence_parallel]
    for module in asked:
        if hf_compat.is_model(module):
            _require_one_sequence(module)
    streams = [
        (module, plan.stream)
        for module in asked
        if isinstance(plan := find(type(module)), Plan) and plan.stream is not None
    ]
    if asked and not streams:
        raise ValueError(
            f"sequence_parallel = True for {type(model).__name__}, required: a class registered "
            "with stream=Stream(blocks, norm), which says where its sequence is split; register "
            "one, or leave the option off"
        )
    for owner, stream in streams:
        for module in owner.get_submodule(stream.blocks).modules():
            _require_rows(module, chosen[module])


def _require_one_sequence(model: Any) -> None:
    config = model.config
    for name in ("is_encoder_decoder", "add_cross_attention", "chunk_size_feed_forward"):
        if value := getattr(config, name, None):
            raise ValueError(
                f"sequence_parallel = True for {type(model).__name__} with config.{name} = "
                f"{value}, required: one sequence, computed at once; leave the option off"
            )


def _require_rows(module: nn.Module, options: Options) -> None:
    name = type(module).__name__
    if not (options.enabled and options.sequence_parallel):
        raise ValueError(
            f"{name} lies in a block whose sequence is split and has enabled = {options.enabled}, "
            f"sequence_parallel = {options.sequence_parallel}, required: True for all of a block"
        )
    if isinstance(find(type(module)), Replacement) or "_tensorpar_replacement" in module.__dict__:
        raise ValueError(
            f"{name} in a block whose sequence is split is replaced by a class of your own, which "
            "would be given some positions only; leave sequence_parallel off"
        )
    if isinstance(module, ColumnParallel) and module.gather_output:
        raise ValueError(
            f"{name} in a block whose sequence is split has gather_output = True, required: False, "
            "with a row-parallel layer after it"
        )
