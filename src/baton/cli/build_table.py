"""`baton build-table`: count the tri-grams that `aded` drafts from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.command import command
from baton.cli.console import err, progress_bar
from baton.cli.sources import Corpus, CorpusTokenizer, check_source


def register(app: typer.Typer) -> None:
    command(
        app,
        "build-table",
        examples=[
            "baton build-table books.txt --tokenizer gpt2 --out my-table",
            "baton build-table src/*.py answers.jsonl --tokenizer models/pycode-target --out code-table --top 24",
        ],
    )(build_table)


def build_table(
    data: Corpus,
    tokenizer: CorpusTokenizer,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the table.")],
    top: Annotated[int, typer.Option(min=1, help="Successors kept of each pair of tokens.")] = 12,
) -> None:
    """Count which tokens follow each pair of tokens, for drafting with `aded:table=DIR`.

    The table is read where it lies on disk. A folder that holds a table already is replaced.
    """
    check_source(tokenizer)
    from baton.data.corpus import load_tokenizer, read_ids
    from baton.drafters.parts.store import write_store
    from baton.drafters.parts.trigrams import KIND, build

    encoder = load_tokenizer(tokenizer)
    total = sum(path.stat().st_size for path in data)
    tokens = 0
    with progress_bar() as bar:
        task = bar.add_task("bytes", total=total)

        def texts() -> Iterator[list[int]]:
            nonlocal tokens
            for ids, size in read_ids(data, encoder):
                tokens += len(ids)
                yield ids
                bar.advance(task, size)

        arrays = build(texts(), len(encoder), top)
    about = {"vocabulary": len(encoder), "top": top, "tokens": tokens, "sources": [path.name for path in data]}
    write_store(out, KIND, encoder, arrays, about)
    pairs, triples = len(arrays["keys"]), len(arrays["successors"])
    megabytes = sum(array.nbytes for array in arrays.values()) / 1e6
    err.print(
        f"wrote {out}: {pairs:,} pairs of tokens with {triples:,} successors, from {tokens:,} tokens, "
        f"{megabytes:.1f} MB: draft with aded:table={out}",
        soft_wrap=True,
    )
