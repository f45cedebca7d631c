"""How the translators refuse: as the rest of the house does."""

from tensorpar.problems import refuse

__all__ = ["refuse"]
