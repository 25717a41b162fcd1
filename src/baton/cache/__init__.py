"""Keys and values of the rows being written."""

from baton.cache.cross import CrossCache
from baton.cache.memory import Memory
from baton.cache.rows import RowCache, fill_holes

__all__ = ["CrossCache", "Memory", "RowCache", "fill_holes"]
