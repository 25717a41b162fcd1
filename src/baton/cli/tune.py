"""`baton tune` and `baton doctor`: which method for this model, and what stands in its way."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from baton.cli.command import command
from baton.cli.console import err, loading, out, progress_bar
from baton.cli.evaluate import measuring
from baton.cli.generate import CONFIG, load_writer
from baton.cli.options import Machine
from baton.cli.sources import check_methods, check_source
from baton.data.storage import storage_errors
from baton.errors import BatonError
from baton.types import Sampling

MARKS = {"ok": "[green]ok", "note": "[cyan]note", "warning": "[yellow]warning", "error": "[red]error"}


def register(app: typer.Typer) -> None:
    command(
        app,
        "profile",
        examples=[
            "baton profile models/pycode-target",
            "baton profile gpt2-xl --context 1024 --batch-size 1 --json",
            "baton profile models/pycode-target --runtime int4 --data code",
        ],
    )(profile)
    command(
        app,
        "tune",
        examples=[
            "baton tune models/pycode-target --prompts code --minutes 2",
            "baton tune gpt2-xl --prompts mine.jsonl --assistant gpt2 --minutes 10",
        ],
    )(tune)
    command(
        app,
        "doctor",
        examples=["baton doctor gpt2", "baton doctor gpt2-xl draft-model:model=gpt2", "baton doctor my-handoff --json"],
    )(doctor)


def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    sampling: Sampling,
    machine: Machine,
    prompts: Annotated[str, typer.Option("--prompts", "-p", metavar="FILE", help="Your prompts, or a suite's name.")],
    minutes: Annotated[float, typer.Option(min=0.01, help="When the race ends at the latest.")] = 5.0,
    method: Annotated[
        list[str], typer.Option(help="What races, repeatable; by default short and long drafts of what needs no model.")
    ] = [],  # noqa: B006 - typer copies it
    assistant: Annotated[
        str | None, typer.Option(metavar="S", help="Small model that also races, as a draft model.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts written together.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 128,
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where baton.toml is written.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """Find the fastest method for your model, prompts and machine, and write baton.toml.

    The price of a pass over several tokens is measured first; then methods race on your prompts until one is left or
    the time is up. `baton generate MODEL` in that folder uses the winner. All methods write the same texts.
    """
    if method:
        check_methods(method)
    check_source(model, assistant, llm)
    from baton.bench.suites import read_suite

    read_suite(prompts)
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.bench.tune import CANDIDATES
    from baton.bench.tune import tune as race

    with progress_bar() as bar:
        task = bar.add_task("race", total=60 * minutes)

        def progress(gone: float, leader: str) -> None:
            bar.update(task, completed=min(gone, 60 * minutes), description=f"race: {leader}")

        found = race(
            writer,
            read_suite(prompts, tokenizer=writer.prompt_tokenizer),
            candidates=method or CANDIDATES,
            assistant=assistant,
            seconds=60 * minutes,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            progress=progress,
        )
    path = folder / CONFIG
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(found.to_toml(model, batch_size), encoding="utf-8")
    if as_json:
        summary = {"winner": found.winner, "standings": [asdict(s) for s in found.standings], "price_s": found.price}
        sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    else:
        made = Table(box=box.SIMPLE_HEAD)
        for heading in ("", "speed-up", "95 %", "groups", ""):
            made.add_column(heading, justify="left" if heading == "" else "right")
        for each in found.standings:
            low, high = each.speedup_interval
            made.add_row(
                escape(each.method), f"{each.speedup:.2f}x", f"{low:.2f}-{high:.2f}", str(each.groups), each.left
            )
        out.print(made)
        cheap = ", ".join(f"{rows}: {seconds / found.price[1]:.2f}x" for rows, seconds in found.price.items())
        out.print(f"[dim]A pass over so many tokens costs, over one ({1000 * found.price[1]:.2f} ms): {cheap}")
        out.print(f"[bold]{escape(found.winner)}")
    err.print(f"wrote {path}", soft_wrap=True)


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    machine: Machine,
    rows: Annotated[list[int], typer.Option(min=1, help="New tokens, repeatable.")] = [1, 2, 4, 8, 16, 32, 64],  # noqa: B006
    context: Annotated[list[int], typer.Option(min=1, help="Tokens before them, repeatable.")] = [64, 512, 2048],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(min=1, help="Requests in a pass, repeatable.")] = [1, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="How often each pass is timed; the median counts.")] = 7,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", metavar="FILE", help="Suite or file: what int8 or int4 does to its perplexity."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Use only so many texts of --data.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """Measure what a pass of MODEL costs here, and keep it.

    A pass over several new tokens verifies a draft; how much dearer it is than a pass over one decides how much may be
    drafted. The result is kept per machine, model, dtype, runtime and number of threads. With --runtime int8 or int4,
    --data shows what fewer bits cost: perplexity of the texts' responses, or of the second halves of prompts without.
    """
    check_source(model, llm)
    if data is not None and machine.runtime not in ("int8", "int4"):
        raise BatonError(
            f"--data compares fewer bits with the weights as they are, and --runtime {machine.runtime} has "
            "no fewer: give --runtime int8 or int4"
        )
    from baton.bench.suites import read_suite

    if data is not None:
        read_suite(data)  # a wrong name is better known before a model is loaded
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.runtime.profile import measure_profile

    with measuring() as progress:
        found = measure_profile(
            writer, rows=rows, contexts=context, batches=batch_size, repeats=repeats, progress=progress
        )
    path = found.save()
    quality: dict[str, float] = {}
    if data is not None:
        from baton.quality import cost_of_bits

        tasks = read_suite(data, tokenizer=writer.prompt_tokenizer).first(limit).tasks
        with err.status("perplexity"):
            quality = cost_of_bits(writer, [(task.prompt, "".join(task.references[:1])) for task in tasks])
    if as_json:
        report = asdict(found) | ({"perplexity": quality} if quality else {})
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        how = f"{found.about['dtype']}, runtime {found.about['runtime']}, {found.about['threads']} threads"
        made = Table(title=f"{model}: {how}; milliseconds", title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("batch", "context", *(f"{count} rows" for count in found.rows)):
            made.add_column(heading, justify="right")
        for batch, by_context in zip(found.batches, found.seconds, strict=True):
            for size, seconds in zip(found.contexts, by_context, strict=True):
                made.add_row(str(batch), str(size), *(f"{1000 * each:.2f}" for each in seconds))
        out.print(made)
        if quality:
            smaller, own = quality.values()
            out.print(f"perplexity {smaller:.3f}, on the model's own weights {own:.3f}: {smaller / own - 1:+.2%}")
    if found.busy:
        err.print(f"[yellow]the machine was busy during {found.busy} passes: measure again when it is quiet")
    err.print(f"wrote {path}", soft_wrap=True)


def doctor(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    machine: Machine,
    method: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="What is to draft for it.")] = None,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at a model, and a method for it: what fits, what does not, and what to do about it.

    The exit code is 1 where something is in the way.
    """
    check_source(model, llm)
    machine.prepare()
    with loading(model):
        from baton.audit.doctor import examine

        findings = examine(model, method, llm=llm, dtype=machine.dtype, device=machine.device, runtime=machine.runtime)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=1) + "\n")
    else:
        made = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for finding in findings:
            made.add_row(MARKS[finding.level], finding.what, f"[dim]{finding.remedy}")
        out.print(made)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
