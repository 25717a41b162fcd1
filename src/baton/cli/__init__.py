"""The command line. Parses, calls the library, prints; the only place that exits."""

from baton.cli.app import app, main

__all__ = ["app", "main"]
