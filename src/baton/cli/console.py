"""Where a command writes: results to stdout, everything about them to stderr."""

import contextlib
import os
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def progress_bar() -> Progress:
    """A progress bar on stderr: what is done, of how many, and how long it still takes."""
    return Progress(
        SpinnerColumn(),
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        console=err,
        transient=not err.is_terminal,  # a log file gets the last state of a bar, not nothing
    )


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Say that something is being loaded, and silence what transformers says meanwhile. Its errors still come."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with err.status(f"loading {what}"):
        from huggingface_hub.utils import logging as hub
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        hub.set_verbosity_error()
        yield


def main_process() -> bool:
    """Whether this is the process that talks to the user: under torchrun, the first."""
    return os.environ.get("RANK", "0") == "0"
