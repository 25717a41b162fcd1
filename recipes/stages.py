"""What recipes share: stages that run in order, are skipped when done, and may run on several processes."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console


def main(
    script: str,
    description: str,
    stages: Mapping[str, bool],
    make: Callable[[argparse.Namespace], Any],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    on_request: Collection[str] = (),
) -> None:
    """Run a recipe's stages from the command line.

    Args:
        script: the recipe's file, for `torchrun`.
        stages: name -> whether torchrun may run it; the recipe has a method of that name, `_` for `-`, which returns
            False when it was interrupted.
        make: the recipe from parsed arguments; called when a stage runs.
        add_arguments: adds the recipe's own; its data belongs there.
        on_request: stages that run only when they are named.
    """
    name = Path(script).stem.replace("_", "-")
    cache = Path.home() / ".cache" / "baton" / name  # outside of the clone: a run outlives it
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help=_help(stages, on_request))
    parser.add_argument("--out", type=Path, default=cache, help=f"where runs are kept; {cache}")
    parser.add_argument("--processes", type=int, default=1, help="training processes")
    add_arguments(parser)
    args = parser.parse_args()
    if unknown := set(args.stages) - set(stages):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}: choose from {', '.join(stages)}")
    worker = "LOCAL_RANK" in os.environ
    console = Console(quiet=worker and os.environ["RANK"] != "0")
    recipe: Any = None
    for stage in args.stages or [name for name in stages if name not in on_request]:
        done = args.out / stage / "done"
        if done.exists():
            console.print(f"[green]{stage}: done")
            continue
        done.parent.mkdir(parents=True, exist_ok=True)
        if args.processes > 1 and stages[stage] and not worker:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.processes)]
            if subprocess.run([*launch, script, stage, *_same(args)]).returncode:
                sys.exit(f"{stage} stopped; run the same command again to continue")
            continue
        console.print(f"[bold]{stage}")
        recipe = recipe or make(args)
        if getattr(recipe, stage.replace("-", "_"))() is False:
            sys.exit(f"{stage} was interrupted; run the same command again to continue")
        if not worker or os.environ["RANK"] == "0":
            done.touch()


def _help(stages: Iterable[str], on_request: Collection[str]) -> str:
    rest = f" but {', '.join(on_request)}" if on_request else ""
    return f"any of {', '.join(stages)}; none means all{rest}"


def _same(args: argparse.Namespace) -> list[str]:
    """The arguments again, for another process, but stages and the number of processes."""
    given = {k: v for k, v in vars(args).items() if k not in ("stages", "processes") and v is not None}
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
