"""The callback by which all ranks save and leave a `Trainer`'s loop at the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class LeaveTogether(TrainerCallback):
    """Asks after every optimizer step whether the run must end; the last callback to be asked.

    Args:
        preempted: collective; the same answer on all ranks.
    """

    def __init__(self, preempted: Callable[[], bool]) -> None:
        self._preempted = preempted
        self.left = False

    def on_step_end(self, args: Any, _state: Any, control: Any, **_: Any) -> Any:
        """Save now, evaluate nothing more, stop."""
        if self._preempted():
            self.left = True
            control.should_save = args.save_strategy != "no"
            control.should_evaluate = False
            control.should_training_stop = True
        return control

    def on_epoch_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> Any:
        """What an epoch's end asks for is not done again on the way out."""
        if self.left:
            control.should_save = control.should_evaluate = False
        return control
