"""Methods that draft: one file each. `make` turns `name` or `name:key=value,key=value` into a drafter."""

from baton.drafters.table import METHODS, WITHOUT_MODEL, every, make

__all__ = ["METHODS", "WITHOUT_MODEL", "every", "make"]
