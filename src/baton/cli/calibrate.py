"""`baton calibrate-tree`: the tree of a method that fills trees of ranks, made to fit a model and its texts."""

from pathlib import Path
from typing import Annotated

import typer

from baton.cli.command import command, fail
from baton.cli.console import err, progress_bar
from baton.cli.evaluate import measuring
from baton.cli.generate import load_writer
from baton.cli.options import Machine
from baton.cli.sources import check_methods, check_source, first_prompts
from baton.types import Sampling


def register(app: typer.Typer) -> None:
    command(
        app,
        "calibrate-tree",
        examples=[
            "baton calibrate-tree models/pycode-target token-recycling --data prompts.jsonl --out tree.json",
            "baton calibrate-tree gpt2-xl stand --data prompts.txt --temperature 0.6 --nodes auto --out tree.json",
        ],
    )(calibrate_tree)


def calibrate_tree(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="token-recycling or stand, with options if you like.")
    ],
    sampling: Sampling,
    machine: Machine,
    data: Annotated[Path, typer.Option("--data", "-d", help="Prompts: .jsonl with a 'prompt' in each row, or .txt.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The tree, JSON.")],
    nodes: Annotated[str, typer.Option(metavar="N|auto", help="Nodes; auto: most tokens per second here.")] = "80",
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 30,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 128,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """Find the tree of which most is accepted, for drafting with METHOD:tree=FILE.

    Prompts are answered with a tree of 625 nodes, and the nodes are kept that were accepted most. With --nodes auto
    the price of a pass is measured too, unless `baton profile` has: more nodes are accepted more, and cost more.
    """
    if nodes != "auto" and not (nodes.isdecimal() and int(nodes) > 0):
        fail(f"--nodes {nodes}: give a number of 1 or more, or auto")
    check_methods([method])
    check_source(model, llm)
    prompts = first_prompts(data, limit)
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.bench.calibrate import calibrate
    from baton.drafters.parts.templates import save_tree
    from baton.runtime.profile import load_profile, measure_profile

    with progress_bar() as bar:
        task = bar.add_task("prompts", total=len(prompts))
        found = calibrate(
            writer,
            method,
            prompts,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            progress=lambda done, total: bar.update(task, completed=done),
        )
    if nodes == "auto":
        with measuring() as progress:
            profile = load_profile(writer) or measure_profile(writer, batches=(1,), progress=progress)
        if profile.busy:
            err.print("[yellow]the machine was busy while passes were timed: calibrate again when it is quiet")
        size = found.fastest(lambda rows: profile.cost(rows, round(found.length)))
        if not size:
            size = 1
            err.print("[yellow]plain decoding is faster here than with any tree: this one has a single node")
    else:
        size = int(nodes)
    paths = found.tree(size)
    about = {"model": model, "method": method, "prompts": len(prompts), "steps": found.steps}
    save_tree(out, found.ranks, paths, about)
    name = method.partition(":")[0]
    err.print(
        f"wrote {out}: {len(paths)} nodes, {max(map(len, paths))} deep, {found.expected[len(paths)]:.2f} tokens per "
        f"step on these prompts ({found.expected[-1]:.2f} with {len(found.counts)}): draft with {name}:tree={out}",
        soft_wrap=True,
    )
