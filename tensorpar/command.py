"""`tensorpar`, also `python -m tensorpar`: checkpoints on disk, and plans of training steps.

Translation needs no model and planning no checkpoint, so each has its commands where it lives; here
they meet. Neither needs a GPU or a process group.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; 0, or 1 where checkpoints differ or something cannot be done."""
    from tensorpar.planning import command as planning
    from tensorpar.translators import command as translating
    from tensorpar.translators.destination import num_bytes

    whole, commands = translating.parser(__doc__)
    planning.add(commands, num_bytes)
    return translating.run(whole.parse_args(arguments))
