"""`baton generate`: answers to prompts, streamed to the terminal or written to a file."""

import contextlib
import itertools
import json
import math
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.text import Text

import baton
from baton.cli.command import command, fail
from baton.cli.console import err, loading, out, progress_bar
from baton.cli.options import Machine
from baton.cli.sources import check_source
from baton.data.formats import read_prompts
from baton.data.storage import append_jsonl, completed_lines, storage_errors
from baton.drafters import METHODS, make
from baton.errors import BatonError, DataError
from baton.types import TARGET, Output, Rule, Sampling

RULES = get_args(Rule)
CONFIG = "baton.toml"  # written by `baton tune`
GUESSED = ("bold green", "bold cyan", "bold magenta", "bold yellow", "bold blue")  # styles of tokens, a drafter each
WINDOW = 4  # batches between two writes: within it, prompts of like length share a batch


def register(app: typer.Typer) -> None:
    command(
        app,
        "generate",
        examples=[
            'baton generate models/en-de-handoff --prompt "Where is the next station?"',
            "baton generate models/en-de-handoff --input questions.txt --output answers.jsonl --batch-size 64",
            "baton generate gpt2 --prompt 'Once upon a time' --temperature 0.8 --top-p 0.95 --seed 7",
            "baton generate gpt2 --prompt 'def add(a, b):' --drafter prompt-lookup:max_ngram=4 --show-provenance",
            "cat questions.txt | baton generate models/en-de-handoff --prompt - --json",
        ],
    )(generate)


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    sampling: Sampling,
    machine: Machine,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="A prompt, repeatable. - reads one per line from stdin.")
    ] = [],  # noqa: B006 - typer copies it
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="Prompts: .jsonl with a 'prompt' in each row, or .txt lines.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Answers, one line each: .jsonl, or .txt with the text alone."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start --output anew, even if it has lines.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    stop: Annotated[list[str], typer.Option(help="End an answer before this text, repeatable.")] = [],  # noqa: B006
    bad_word: Annotated[list[str], typer.Option(metavar="TEXT", help="Never write this word, repeatable.")] = [],  # noqa: B006
    logit_bias: Annotated[
        list[str],
        typer.Option(metavar="TEXT=NUMBER", help="Add to the logit of a token, by its text or id, repeatable."),
    ] = [],  # noqa: B006
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at the same time.")] = 32,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long for the model.")] = False,
    drafter: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help=f"Draft with NAME or NAME:key=value,...: {', '.join(METHODS)}."),
    ] = None,
    rule: Annotated[
        str, typer.Option(metavar="NAME", help=f"How drafts are verified: {', '.join(RULES)}; typical is lossy.")
    ] = "auto",
    show_provenance: Annotated[
        bool, typer.Option("--show-provenance", help="Colour the text by who wrote each token, with counts under it.")
    ] = False,
    llm: Annotated[
        str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is, if not where it was in training.")
    ] = None,
) -> None:
    """Write answers to prompts.

    One prompt streams to the terminal. A file is answered in batches, each line written as soon as it and all before
    it are finished: after Ctrl-C the same command continues where it stopped. A baton.toml in the working folder that
    `baton tune` wrote for this model names the method that drafts.
    """
    if bool(prompt) == bool(input):
        fail("give either --prompt TEXT (or - for stdin) or --input FILE")
    if input and not output:
        fail(f"where to? give --output FILE with --input {input}")
    if output and not input:
        fail("--output needs --input: the answers to --prompt go to the terminal (use > FILE)")
    if prompt.count("-") and len(prompt) > 1:
        fail("--prompt - reads all prompts from stdin: give no others")
    if show_provenance and (output or as_json):
        fail("--show-provenance colours the terminal; with --json each answer has its sources")
    check_source(model, llm)
    if drafter is None and (drafter := tuned(model)):
        err.print(f"[dim]{CONFIG}: drafting with {drafter} (--drafter plain for none)", soft_wrap=True)
    method = make(drafter) if drafter else None  # a wrong name is better known before a model is loaded
    if input:
        read_prompts(input)  # a malformed row is better known before a model is loaded
    machine.prepare()
    writer = load_writer(model, llm, machine)
    tokenizer = writer.response_tokenizer
    sampling = replace(
        sampling,
        bad_words=tuple(ids for word in bad_word for ids in sorted(word_tokens(tokenizer, word))),
        logit_bias=tuple(token_bias(tokenizer, entry) for entry in logit_bias),
    )
    options: dict[str, Any] = {
        "sampling": sampling,
        "max_new_tokens": max_new_tokens,
        "stop": tuple(stop),
        "truncate": truncate,
    }
    rows = batch_size if output or as_json or len(prompt) > 1 else 1
    engine = baton.Engine(writer, method, rule=rule, max_rows=rows, patience=max(1, rows // 8))  # type: ignore[arg-type]
    if input and output:
        prompts = read_prompts(input, tokenizer=writer.prompt_tokenizer)
        answer_file(engine, prompts, output, options, overwrite=overwrite)
    elif show_provenance:
        for index, text in enumerate(prompt_lines(prompt)):
            show_answer(engine, text, options | {"first_index": index})
    elif as_json or len(prompt) > 1:
        for each in baton.generate(engine, list(prompt_lines(prompt)), **options):
            sys.stdout.write((json.dumps(row(each), ensure_ascii=False) if as_json else each.text) + "\n")
    else:
        for index, text in enumerate(prompt_lines(prompt)):
            stream_answer(engine, text, options | {"first_index": index})


def tuned(model: str, folder: Path = Path()) -> str | None:
    """The method that `baton tune` found for this model, where the working folder has its `baton.toml`.

    Raises: DataError when that cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8")).get("generate", {})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): mend it, delete it, or run baton tune again") from error
    if found.get("model") != model:
        return None
    return str(found["drafter"]) if "drafter" in found else None


def load_writer(model: str, llm: str | None, machine: Machine) -> Any:
    """A `Writer` from a folder or Hub id; `llm` is where a hand-off finds its LLM."""
    with loading(model):
        if llm is None:
            return baton.load(model, dtype=machine.dtype, device=machine.device, runtime=machine.runtime)
        return baton.HandoffModel.from_pretrained(
            model, llm=llm, dtype=machine.dtype, device=machine.device, runtime=machine.runtime
        )


def word_tokens(tokenizer: Any, word: str) -> set[tuple[int, ...]]:
    """The token sequences that write a word: alone, and with its space, as most tokenizers write it inside a text."""
    if not word.strip():
        fail("--bad-word: give a word")
    return {tuple(ids) for text in (word, f" {word}") for ids in (_ids(tokenizer, text), _pieces(tokenizer, text))}


def token_bias(tokenizer: Any, entry: str) -> tuple[int, float]:
    """(token id, what is added) from `TEXT=NUMBER` or `ID=NUMBER`. Exits for what is neither."""
    text, _, number = entry.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not text or not math.isfinite(value):
        fail(f"--logit-bias {entry}: give TEXT=NUMBER, such as ' yes=2.5', or ID=NUMBER")
    if text.isdecimal() and int(text) < len(tokenizer):
        return int(text), value
    ids = _pieces(tokenizer, text)
    if len(ids) != 1:
        pieces = ", ".join(f"{tokenizer.decode([i])!r} ({i})" for i in ids)
        fail(f"--logit-bias {entry}: {text!r} is {len(ids)} tokens here, {pieces}: give one of them, by id")
    return ids[0], value


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pieces(tokenizer: Any, text: str) -> list[int]:
    """Without a piece that only says where a word begins."""
    return [i for i in _ids(tokenizer, text) if tokenizer.decode([i])]


def prompt_lines(prompts: list[str]) -> Iterator[str]:
    """The prompts, or the lines of stdin for `-`, as they come."""
    if prompts != ["-"]:
        yield from prompts
        return
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8: {error}") from error


def stream_answer(engine: Any, prompt: str, options: dict[str, Any]) -> None:
    """One answer, printed while it is written."""
    try:
        for piece in baton.stream(engine, prompt, **options):
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()


def show_answer(engine: Any, prompt: str, options: dict[str, Any]) -> None:
    """One answer in colours: what each drafter guessed stands out from what the target wrote itself."""
    engine.submit(engine.requests([prompt], **options))
    request = engine.waiting[0]
    styles = {TARGET: ""}
    while not engine.idle:
        for token in engine.step().tokens:
            style = styles.setdefault(token.source, GUESSED[(len(styles) - 1) % len(GUESSED)])
            out.print(Text(token.text, style=style), end="", soft_wrap=True)
    output = request.output()
    guessed = Counter(source for source in output.sources if source != TARGET)
    drafted: Counter[str] = sum((step.drafted for step in output.steps), Counter())
    counts = "; ".join(
        f"[/][{styles.get(name, GUESSED[0])}]{guessed[name]} guessed by {name}[/][dim] of {drafted[name]} drafted"
        for name in sorted(drafted, key=lambda name: (-guessed[name], name))
    )
    out.print(
        f"\n[dim]{len(output.token_ids)} tokens in {len(output.steps)} steps: {output.acceptance_length:.2f} per step; "
        f"{counts or 'nothing was drafted'}{f'; {output.error}' if output.error else ''}[/]",
        soft_wrap=True,
        highlight=False,
    )


def row(output: Output) -> dict[str, Any]:
    """An answer as JSON."""
    return {
        "prompt": output.prompt,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "tokens": len(output.token_ids),
        **({"error": output.error} if output.error else {}),
        **(drafting(output) if any(step.num_drafted for step in output.steps) else {}),
    }


def drafting(output: Output) -> dict[str, Any]:
    """Who wrote which token, and the raw counts of each step: drafted, accepted, emitted."""
    steps = [[step.num_drafted, step.accepted, step.emitted] for step in output.steps]
    return {"sources": output.sources, "steps": steps, "acceptance_length": output.acceptance_length}


class OutputFile:
    """Answers on disk, in the order of their prompts; opening one goes on after the last whole line.

    Args:
        path: `.txt` gets the text alone, one line per answer, its line breaks as spaces; anything else JSON lines.
    Raises:
        DataError: the file has a malformed row, or answers other prompts.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, prompts: list[str], *, overwrite: bool = False) -> None:
        self.path, self.plain = path, path.suffix.lower() == ".txt"
        with storage_errors(path):
            if overwrite:
                path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._check(prompts) if path.exists() else 0  # answers there are
        self._lines = None if self.plain else append_jsonl(path)

    def _check(self, prompts: list[str]) -> int:
        """How many answers there are, and that they are answers to these prompts; drops a line that was cut off."""
        advice = "choose another --output, or start it anew with --overwrite"
        if self.plain:
            data = self.path.read_bytes()
            os.truncate(self.path, data.rfind(b"\n") + 1)
            done = data.count(b"\n")
        else:
            found = [each.get("prompt") for each in completed_lines(self.path)]
            for number, (there, prompt) in enumerate(zip(found, prompts, strict=False), start=1):
                if there != prompt:
                    raise DataError(f"{self.path}:{number}: answers another prompt than the input has there: {advice}")
            done = len(found)
        if done > len(prompts):
            raise DataError(f"{self.path} has {done} answers, more than the {len(prompts)} prompts: {advice}")
        return done

    def add(self, outputs: list[Output]) -> None:
        if self._lines is not None:
            self._lines.write(*map(row, outputs))
        else:
            text = "".join(" ".join(each.text.splitlines()) + "\n" for each in outputs)
            with storage_errors(self.path, "the finished lines are kept"), self.path.open("ab") as file:
                file.write(text.encode("utf-8"))
        self.done += len(outputs)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def answer_file(engine: Any, prompts: list[str], path: Path, options: dict[str, Any], *, overwrite: bool) -> None:
    """Answer the prompts that have no answer in `path` yet, a window of some batches at a time."""
    from baton.models.prompts import tokenize_prompts

    # All of them first: a prompt that is too long should not be found after an hour.
    writer = engine.writer
    tokenize_prompts(writer.prompt_tokenizer, prompts, engine.prompt_limits, truncate=options["truncate"])
    total = len(prompts)
    with contextlib.closing(OutputFile(path, prompts, overwrite=overwrite)) as file:
        if file.done == total:
            err.print(f"{path} has all {total} answers: nothing to do (--overwrite starts anew)", soft_wrap=True)
            return
        if file.done:
            err.print(f"continuing {path}: {file.done} of {total} answers are there", soft_wrap=True)
        try:
            with progress_bar() as bar:
                task = bar.add_task("answers", total=total, completed=file.done)
                window = WINDOW * engine.max_rows
                for start in range(file.done, total, window):
                    finished: dict[int, Output] = {}

                    def keep(output: Output, index: int, start: int = start, finished: Any = finished) -> None:
                        finished[start + index] = output
                        bar.update(task, completed=start + len(finished))

                    try:
                        baton.generate(
                            engine,
                            prompts[start : start + window],
                            first_index=start,
                            on_finish=keep,
                            **options,
                        )
                    finally:
                        ready = itertools.takewhile(finished.__contains__, itertools.count(file.done))
                        file.add([finished[index] for index in ready])
        except (KeyboardInterrupt, BatonError):
            err.print(f"{path} has {file.done} of {total} answers; the same command continues", soft_wrap=True)
            raise
    err.print(f"wrote {path}: {total} answers", soft_wrap=True)
