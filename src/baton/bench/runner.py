"""The measurement itself: every group of prompts is written by each contender in turn, in one run.

The order changes from group to group, so that a machine that slows down slows them all. Before each group a fixed
piece of work is timed: where it takes longer than usual another process is busy, and the runner waits for it a while.
What is done is on disk after every group; the same command continues.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from baton.bench.contenders import Contender, failed
from baton.bench.record import Record, Run, read_run, to_json
from baton.bench.suites import Suite
from baton.data.storage import append_jsonl, storage_errors
from baton.errors import BatonError
from baton.machine import Quiet
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.types import Output

Progress = Callable[[str, int, int], None]
Unit = tuple[str, int, int, int]  # suite, batch size, repeat, group


def measure(
    writer: Writer,
    make: Callable[[int], Sequence[Contender]],
    suites: Sequence[Suite],
    run: Run,
    *,
    fill: bool = True,
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[Run, list[Record]]:
    """Let all contenders write all prompts.

    Args:
        writer: the target, whose tokenizer counts prompt tokens.
        make: gives the contenders for a batch size; called once for each, in which they may load what they need.
        fill: leave out the last prompts where they do not fill a batch.
        out: keeps the records (JSONL); a run with the same settings that was cut off is continued.
        progress: called with (what, done, total) after every group.
    Returns: the run, as it was started, and its records.
    Raises: BatonError when `out` holds a run with other settings.
    """
    run, records = _resume(run, out, overwrite)
    done = {_unit(record) for record in records}
    quiet = Quiet(record.probe_s for record in records)
    log = append_jsonl(out) if out is not None else None
    if log is not None and not records:
        log.write(to_json(run))
    try:
        for size in run.batch_sizes:
            contenders: list[Contender] = []
            for suite in suites:
                groups = _groups(len(suite.tasks), size, fill)
                units = [(suite.name, size, repeat, n) for repeat in range(run.repeats) for n in range(len(groups))]
                for count, unit in enumerate(units, start=1):
                    if unit not in done:
                        if not contenders:
                            contenders = [c for c in make(size) if size == 1 or c.batches]
                            for contender in contenders:  # the first pass allocates, compiles and warms up
                                write(contender, [suite.tasks[index].prompt for index in groups[0]], 0)
                        seed = run.sampling.get("seed", 0)
                        new = measure_group(writer, contenders, suite, groups[unit[3]], unit, quiet, seed)
                        records += new
                        if log is not None:
                            log.write(*map(to_json, new))
                    if progress is not None:
                        progress(f"{suite.name}, batch {size}", count, len(units))
    finally:
        if log is not None:
            log.close()
    return run, records


def measure_group(
    writer: Writer,
    contenders: Sequence[Contender],
    suite: Suite,
    indices: Sequence[int],
    unit: Unit,
    quiet: Quiet,
    seed: int = 0,
) -> list[Record]:
    """One group of prompts, written by each contender in turn.

    Args:
        indices: of the prompts in the suite; unit: (suite, batch size, repeat, group), recorded with them.
    """
    prompts = [suite.tasks[index].prompt for index in indices]
    encoded = tokenize_prompts(writer.prompt_tokenizer, prompts, writer.prompt_limits, truncate=True)
    probe = quiet.wait()
    _, size, repeat, number = unit
    made: list[Record] = []
    shift = number % len(contenders)
    for contender in [*contenders[shift:], *contenders[:shift]]:
        started = time.perf_counter()
        outputs = write(contender, prompts, indices[0])
        seconds = time.perf_counter() - started
        for index, ids, output in zip(indices, encoded, outputs, strict=True):
            where = {
                "contender": contender.name,
                "suite": suite.name,
                "category": suite.tasks[index].category,
                "prompt": index,
                "batch_size": size,
                "group": number,
                "repeat": repeat,
                "group_s": seconds,
                "prompt_ids": ids,
                "seed": seed,
                "probe_s": probe,
            }
            made.append(Record.of(output, **where))
    return made


def write(contender: Contender, prompts: Sequence[str], first_index: int) -> list[Output]:
    """What it wrote; a contender that raises has failed at these prompts, and the others go on."""
    try:
        return contender.write(prompts, first_index)
    except Exception as error:
        return failed(prompts, error)


def _groups(count: int, size: int, fill: bool) -> list[list[int]]:
    """Indices of the prompts written together."""
    groups = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    return [group for group in groups if len(group) == size or not fill] or groups


def _unit(record: Record) -> Unit:
    return record.suite, record.batch_size, record.repeat, record.group


def _resume(run: Run, out: Path | None, overwrite: bool) -> tuple[Run, list[Record]]:
    """The run to go on with, and what it has; the file is gone where there is nothing to go on with."""
    if out is None or not out.exists():
        return run, []
    if not overwrite:
        before, records, _ = read_run(out)
        changed = [name for name, value in before.settings.items() if run.settings[name] != value]
        if changed:
            raise BatonError(
                f"{out} holds a run with other settings ({', '.join(changed)}): name another file, or start it anew "
                "with --overwrite"
            )
        if records:
            return before, records
    with storage_errors(out):
        out.unlink()
    return run, []
