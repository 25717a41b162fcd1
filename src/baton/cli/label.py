"""`baton label`: training targets written by the LLM itself."""

from pathlib import Path
from typing import Annotated

import typer

import baton
from baton.cli.command import command
from baton.cli.console import err, loading, progress_bar
from baton.cli.options import Machine
from baton.cli.sources import check_source
from baton.data.formats import read_prompts


def register(app: typer.Typer) -> None:
    command(
        app,
        "label",
        examples=[
            "baton label --llm models/en-de-llm --data prompts.jsonl --out pairs.jsonl",
            "baton label --llm google/flan-t5-large --data prompts.txt --out pairs.jsonl --num-beams 5 --batch-size 16",
        ],
    )(label)


def label(
    llm: Annotated[str, typer.Option(metavar="L", help="The model that writes: folder or Hub id.")],
    data: Annotated[
        Path, typer.Option("--data", "-d", help="Prompts: .jsonl with a 'prompt' in each row, .tsv, .txt.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Pairs, JSON lines: prompt and response.")],
    machine: Machine,
    num_beams: Annotated[int, typer.Option(min=1, help="1 is greedy; more is beam search, slower and better.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a response.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at the same time.")] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long for the model.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start --out anew, even if it has lines.")] = False,
) -> None:
    """Let the LLM write the responses that a hand-off is trained on.

    Learning from the LLM's own words is easier for a small model than learning from people's. An interrupted run
    continues with the same command.
    """
    check_source(llm)
    read_prompts(data)  # a malformed row is better known before a model is loaded
    machine.prepare()
    with loading(llm):
        from baton.handoff.label import CHUNK
        from baton.handoff.label import label as write_labels

        writer = baton.load(llm, dtype=machine.dtype, device=machine.device, runtime=machine.runtime)
        prompts = read_prompts(data, tokenizer=writer.prompt_tokenizer)
    if overwrite:
        out.unlink(missing_ok=True)
    try:
        with progress_bar() as bar:
            task = bar.add_task("responses", total=len(prompts))
            report = write_labels(
                writer,
                prompts,
                out,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                batch_size=batch_size,
                truncate=truncate,
                # Sorted by length within a chunk, written after it: not so long that an interruption costs much.
                chunk=min(CHUNK, 16 * batch_size),
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        err.print(f"stopped: the finished lines are in {out}; the same command continues", soft_wrap=True)
        raise
    notes = [f"{report.resumed} were there" if report.resumed else "", f"{report.empty} empty" if report.empty else ""]
    extra = f" ({', '.join(note for note in notes if note)})" if any(notes) else ""
    err.print(f"wrote {out}: {report.prompts} pairs{extra}", soft_wrap=True)
