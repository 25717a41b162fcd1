"""`baton train`: from an LLM, an SLM and pairs to a hand-off. Loaded when used, for its options import transformers."""

import contextlib
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from baton.cli.app import TRAIN_HELP
from baton.cli.command import INTERRUPTED, command
from baton.cli.console import err, loading, main_process, progress_bar
from baton.cli.options import set_threads
from baton.cli.sources import check_source
from baton.data.formats import read_pairs
from baton.data.tatoeba import sentence_key
from baton.errors import BatonError, DataError
from baton.handoff.config import HandoffConfig, HandoffOptions
from baton.handoff.features import estimate_gib
from baton.handoff.model import HandoffModel, same_tokenizer, with_adapter
from baton.handoff.read import resolve_layer
from baton.handoff.training import RUN, train_handoff
from baton.models.loading import at_revision, kind_of, read_config
from baton.train.options import TrainOptions
from baton.train.trainer import last_checkpoint
from baton.types import Pair

SAVED = "saved"  # in a run's folder: its hand-off has been written
app = typer.Typer(
    add_completion=False, help=TRAIN_HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)


def handoff(
    llm: Annotated[str, typer.Option(metavar="L", help="The large model: folder or Hub id. It reads, and is frozen.")],
    slm: Annotated[str, typer.Option(metavar="S", help="The small model: folder or Hub id. It writes.")],
    data: Annotated[Path, typer.Option("--data", "-d", help="Training pairs: .jsonl, .tsv or the Tatoeba zip.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the hand-off goes.")],
    handoff: HandoffOptions,
    train: TrainOptions,
    validation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Validation pairs; by default some of --data are kept out.")
    ] = None,
    validation_size: Annotated[
        int, typer.Option(min=0, help="Prompts of --data kept out; 0 means 5 %, at most 1000.")
    ] = 0,
    cache_gb: Annotated[
        float, typer.Option(min=0, help="Disk for the LLM's states, GiB; with too little they are recomputed.")
    ] = 4.0,
    revision: Annotated[str | None, typer.Option(help="Revision of the LLM, for a Hub id.")] = None,
    held_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Test pairs that `baton eval` should use for this hand-off.")
    ] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long for the models.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, even if DIR is not empty.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves the choice to PyTorch.")] = 0,
) -> None:
    """Train a hand-off: the SLM learns to write from what the frozen LLM has read.

    A run that was interrupted, by Ctrl-C or a crash, continues from its last checkpoint with the same command.
    """
    check_source(llm, slm)
    if (out / RUN / SAVED).exists() and not overwrite:
        if main_process():
            err.print(f"{out} holds the finished hand-off of a run: nothing to do (--overwrite trains anew)")
        return
    prepare(out, overwrite=overwrite)
    set_threads(threads)
    with loading(str(data)):
        pairs, skipped = read_pairs(data)
        if validation is not None:
            checked, _ = read_pairs(validation)
        else:
            pairs, checked = split(pairs, validation_size, seed=train.seed)
        if len(pairs) < train.batch_size:
            raise DataError(f"{len(pairs)} training pairs do not fill a batch: lower --batch-size {train.batch_size}")
        facts = plan(llm, slm, pairs, checked, handoff, train, revision=revision, cache_gb=cache_gb)
    if main_process():
        facts["training pairs"] += f" ({skipped} with an empty response were skipped)" if skipped else ""
        step = _step(out)
        facts["into"] = f"{out}, continuing from step {step}" if step else str(out)
        _show(facts)
    finished = False
    with contextlib.suppress(KeyboardInterrupt), caching() as on_cache:
        finished = train_handoff(
            llm=llm,
            slm=slm,
            pairs=pairs,
            validation=checked,
            out=out,
            options=handoff,
            train=train,
            revision=revision,
            cache_gb=cache_gb,
            held_out=_beside(held_out, out) if held_out else None,
            truncate=truncate,
            on_cache=on_cache if main_process() else None,
        )
    if not finished:
        if main_process():
            step = _step(out)
            saved = f"interrupted at step {step}, which is saved" if step else "interrupted before the first checkpoint"
            err.print(f"{saved}; the same command continues")
        raise typer.Exit(INTERRUPTED)
    if main_process():
        (out / RUN / SAVED).touch()
        err.print(f"wrote {out}; measure it: baton eval handoff {out}{'' if held_out else ' --data test.jsonl'}")


command(
    app,
    "handoff",
    examples=[
        "baton train handoff --llm models/en-de-llm --slm models/en-de-slm --data pairs.jsonl --out my-handoff",
        "baton train handoff --llm google/flan-t5-large --slm google/flan-t5-small --data pairs.jsonl "
        "--validation valid.jsonl --out my-handoff --slm-training lora --learning-rate 3e-4 --batch-size 64",
        "torchrun --nproc-per-node 2 -m baton.cli train handoff --llm L --slm S --data pairs.jsonl --out my-handoff",
    ],
)(handoff)


@app.callback()
def _group() -> None:
    """Keeps `handoff` a name of its own while it is the only command."""


def prepare(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else; with `overwrite`, forget the run that is in it.

    Only the run's own state is removed: a hand-off stays until the new one takes its place, other files for good.
    """
    if not main_process():
        return
    if out.exists() and not out.is_dir():
        raise BatonError(f"{out} is a file: give --out a folder")
    if overwrite:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BatonError(f"--overwrite cannot be used with several processes: remove {out / RUN} first")
        shutil.rmtree(out / RUN, ignore_errors=True)
    elif out.is_dir() and any(out.iterdir()) and not (out / RUN / "settings.json").exists():
        raise BatonError(f"{out} is not empty and holds no run to continue: give another --out, or --overwrite")


def split(pairs: Sequence[Pair], size: int, *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs with no prompt in both, whatever its case and punctuation.

    Args:
        size: prompts kept out for validation, one pair each with all responses as references; prompts that differ
            in case and punctuation only count as one; 0 means 5 %, at most 1000.
        seed: the only source of chance: a run that continues sees the same split.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(sentence_key(pair.prompt) or pair.prompt, []).append(pair)
    keys = sorted(groups)
    random.Random(f"validation:{seed}").shuffle(keys)
    kept = keys[: size or min(1000, math.ceil(0.05 * len(keys)))]
    if len(kept) >= len(keys):
        raise DataError(f"{len(keys)} different prompts cannot spare {len(kept)} for validation: lower the number")
    answers: dict[str, list[str]] = {}  # by the very prompt: "3+4" and "3-4" are kept together, not merged
    for key in kept:
        for pair in groups.pop(key):
            answers.setdefault(pair.prompt, []).extend(pair.accepted)
    validation = [
        Pair(prompt=prompt, response=found[0], references=tuple(dict.fromkeys(found)))
        for prompt, found in answers.items()
    ]
    return [pair for group in groups.values() for pair in group], validation


def plan(
    llm: str,
    slm: str,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    options: HandoffOptions,
    train: TrainOptions,
    *,
    revision: str | None,
    cache_gb: float,
) -> dict[str, str]:
    """What a run will do, before it does it: sizes from the configurations alone, no weights are read."""
    for source in (llm, slm):
        read_config(source)  # says clearly when there is no model
    (llm, named), (slm, of_slm) = at_revision(llm), at_revision(slm)
    revision = revision or named
    llm_config = AutoConfig.from_pretrained(llm, revision=revision)
    slm_config = AutoConfig.from_pretrained(slm, revision=of_slm)
    tokenizer = AutoTokenizer.from_pretrained(llm, revision=revision)
    kind = kind_of(llm_config)
    mixed = kind == "decoder-only" and resolve_layer(options.layer, llm_config.num_hidden_layers) is None
    layers = llm_config.num_hidden_layers if mixed else 1
    width = llm_config.hidden_size
    with torch.device("meta"):  # shapes without memory
        reader = AutoModel.from_config(llm_config)
        auto = AutoModelForSeq2SeqLM if slm_config.is_encoder_decoder else AutoModelForCausalLM
        writer = auto.from_config(slm_config)
        slm_size = _parameters(writer)
        config = HandoffConfig(
            llm={
                "width": width,
                "layers_read": layers,
                "embedding_width": reader.get_input_embeddings().weight.shape[1],
            },
            slm=slm_config.to_dict(),
            options=asdict(options),
            same_tokenizer=same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(slm, revision=of_slm)),
        )
        if options.slm_training == "lora":
            writer = with_adapter(writer, options)
        trainable = _parameters(HandoffModel(config, writer), trainable=True)
    per_epoch = len(pairs) // train.batch_size
    steps = train.max_steps if train.max_steps > 0 else math.ceil(train.epochs * per_epoch)
    if options.signal in ("llm", "shuffled"):
        ids = tokenizer([p.prompt for p in (*pairs, *validation)], verbose=False)["input_ids"]
        room = estimate_gib(ids, width * layers)
        cached = f"{room:.2f} GiB on disk" if room <= cache_gb else f"{room:.2f} GiB, more than --cache-gb {cache_gb:g}"
        cached += "" if room <= cache_gb else ": recomputed at each step"
    else:
        cached = "not needed"
    return {
        "LLM": f"{llm}: {_millions(_parameters(reader))} parameters, {kind}, frozen, read at layer {options.layer}",
        "SLM": f"{slm}: {_millions(slm_size)} parameters, {'' if config.same_tokenizer else 'own tokenizer, '}"
        f"training: {options.slm_training}",
        "trainable": f"{_millions(trainable)} parameters, fusion: {options.fusion}",
        "training pairs": f"{len(pairs):,}",
        "validation pairs": f"{len(validation):,}",
        "steps": f"{steps:,} of {train.batch_size} pairs ({steps / max(1, per_epoch):.1f} epochs)",
        "LLM's states": cached,
    }


@contextlib.contextmanager
def caching() -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears when the LLM's states are computed, and leaves before training shows its own."""
    bar = progress_bar()
    tasks: list[Any] = []

    def progress(done: int, total: int) -> None:
        if not tasks:
            bar.start()
            tasks.append(bar.add_task("LLM reads prompts", total=total))
        bar.update(tasks[0], completed=done)
        if done >= total:
            bar.stop()

    try:
        yield progress
    finally:
        bar.stop()


def _show(facts: dict[str, str]) -> None:
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        table.add_row(f"[dim]{name}", escape(fact))
    err.print(table)


def _step(out: Path) -> int:
    """Steps done by the run in a folder."""
    checkpoint = last_checkpoint(out / RUN)
    return int(checkpoint.name.split("-")[1]) if checkpoint else 0


def _parameters(model: nn.Module, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _beside(file: Path, folder: Path) -> str:
    """A path as seen from a folder, so that both can move together."""
    try:
        return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return str(file.resolve())
