"""`baton build-datastore`: text that drafts are retrieved from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.command import command
from baton.cli.console import err, progress_bar
from baton.cli.sources import Corpus, CorpusTokenizer, check_source
from baton.errors import BatonError


def register(app: typer.Typer) -> None:
    command(
        app,
        "build-datastore",
        examples=[
            "baton build-datastore src/*.py --tokenizer models/pycode-target --out code-store",
            "baton build-datastore answers.jsonl -m models/pycode-target --out code-store --append",
            "baton generate models/pycode-target --prompt 'def add(a, b):' --drafter rest:datastore=code-store",
        ],
    )(build_datastore)


def build_datastore(
    data: Corpus,
    tokenizer: CorpusTokenizer,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the datastore.")],
    append: Annotated[bool, typer.Option("--append", help="Add to the datastore that is there.")] = False,
) -> None:
    """Index text that `rest:datastore=DIR` and `rasd` draft from.

    Source code, documents, or the model's own earlier responses, as generate writes them: what is like the text to
    come. It takes 14 to 16 bytes per token, on disk and, until it is written, in memory. Ctrl-C leaves a datastore as
    it was.
    """
    check_source(tokenizer)
    from baton.data.corpus import load_tokenizer, read_ids
    from baton.drafters.parts.store import HEADER
    from baton.drafters.parts.suffixes import add_documents

    if (out / HEADER).exists() and not append:
        raise BatonError(f"{out} holds something already: --append adds to a datastore, or choose another folder")
    encoder = load_tokenizer(tokenizer)
    total = sum(path.stat().st_size for path in data)
    with progress_bar() as bar:
        task = bar.add_task("bytes", total=total)

        def documents() -> Iterator[list[int]]:
            document: list[int] = []
            for ids, size in read_ids(data, encoder):
                document += ids
                if size:  # the end of a row: what stands in one, a prompt and its response, belongs together
                    yield document
                    document = []
                    bar.advance(task, size)

        about = add_documents(out, documents(), encoder)
    megabytes = sum(path.stat().st_size for path in out.glob("*.npy")) / 1e6
    err.print(
        f"wrote {out}: {about['tokens']:,} tokens of {about['documents']:,} texts, {megabytes:,.1f} MB: draft with "
        f"rest:datastore={out}",
        soft_wrap=True,
    )
