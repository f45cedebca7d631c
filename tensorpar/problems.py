"""One error for all that is wrong with a state dict, so that nobody mends it key by key."""

from __future__ import annotations

from collections.abc import Sequence


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise unless `problems` is empty.

    Args:
        what: what cannot be done, and with what.
        problems: one line per key.

    Raises:
        ValueError: `what`, followed by every problem once.
    """
    distinct = list(dict.fromkeys(problems))
    if distinct:
        plural = "s" if len(distinct) > 1 else ""
        raise ValueError(f"{what}, {len(distinct)} problem{plural}: {'; '.join(distinct)}")
