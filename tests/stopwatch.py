"""A second clock around our engine and another one on `pycode-target`, which counts seconds and tokens by itself.

    python tests/stopwatch.py transformers      JSON: way to decode -> tokens/s in the record, tokens/s by stopwatch

A program of its own, because some engines do not share a process with PyTorch's training.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from baton.bench import metrics
from baton.bench.contenders import Ours
from baton.bench.peers import make_peers
from baton.bench.record import Run
from baton.bench.runner import measure
from baton.bench.suites import read_suite
from baton.models.loading import load

TARGET = Path(__file__).resolve().parents[1] / "models" / "pycode-target"
LENGTH = 48  # tokens


class Stopwatch:
    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0

    def call(self, function: Callable[..., Any], count: Callable[..., int]) -> Callable[..., Any]:
        """The function, watched; `count` tells the tokens of (result, keyword arguments)."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic_ns()
            result = function(*args, **kwargs)
            self.seconds += (time.monotonic_ns() - started) / 1e9
            self.tokens += count(result, kwargs)
            return result

        return watched

    def each(self, function: Callable[..., Iterator[int]]) -> Callable[..., Iterator[int]]:
        """A function that yields tokens, watched while it works on the next one."""

        def watched(*args: Any, **kwargs: Any) -> Iterator[int]:
            source = function(*args, **kwargs)
            take = self.call(lambda: next(source, None), lambda token, _: int(token is not None))
            while (token := take()) is not None:
                yield token

        return watched


def main(peer: str) -> dict[str, tuple[float, float]]:
    writer = load(TARGET, dtype="float32")
    (greedy, *_) = make_peers(peer, writer, max_new_tokens=LENGTH, assistant=None)
    ours = Ours(writer, max_new_tokens=LENGTH)
    watches = {ours.name: Stopwatch(), greedy.name: Stopwatch()}
    step = watches[ours.name].call(ours.engine.step, lambda step, _: len(step.tokens))
    ours.engine.step = step  # type: ignore[method-assign]
    theirs: Any = greedy
    if peer == "llama.cpp":
        theirs.llama.generate = watches[greedy.name].each(theirs.llama.generate)
    else:
        writer.lm.generate = watches[greedy.name].call(
            writer.lm.generate, lambda made, given: made.shape[1] - given["input_ids"].shape[1]
        )

    def forget(what: str, done: int, total: int) -> None:
        if done == 1:  # the warm-up's seconds and the first group's: both clocks start after them
            for watch in watches.values():
                watch.seconds, watch.tokens = 0.0, 0

    about: dict[str, Any] = {key: {} for key in ("suites", "sampling", "machine", "versions")}
    about |= {"git": None, "command": "", "started": "", "absent": [], "step_bytes": 0, "batch_sizes": [1]}
    about |= {"model": "pycode-target", "dtype": "float32", "runtime": "auto", "repeats": 1, "max_new_tokens": LENGTH}
    run = Run(contenders={ours.name: ours.family, greedy.name: greedy.family}, **about)
    _, records = measure(writer, lambda size: [ours, greedy], [read_suite("code").first(4)], run, progress=forget)
    later = [record for record in records if record.group > 0]
    return {
        name: (
            metrics.tokens_per_second(metrics.groups(r for r in later if r.contender == name)),
            watch.tokens / watch.seconds,
        )
        for name, watch in watches.items()
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
