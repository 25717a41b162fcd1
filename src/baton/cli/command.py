"""What every command has in common: options from dataclasses, examples in its help, errors as one red line."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from inspect import Parameter
from typing import Annotated, Any, NoReturn

import typer
import typer.core
from rich.markup import escape

from baton.cli.console import err
from baton.cli.options import expand
from baton.errors import BatonError

BAD_INPUT, INTERRUPTED = 2, 130

LISTS = ("--rows", "--context", "--batch", "--batch-size", "--peer")  # may also be given in one, with commas
OTHER_NAMES = {"--methods": "--method", "--peers": "--peer", "--suites": "--suite"}

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]


class Command(typer.core.TyperCommand):
    """Takes what people write: `--rows 1,2,4`, `--methods`, `--target MODEL`, and `--json` alone, which is stdout."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._plain(args)))

    def _plain(self, args: Sequence[str]) -> Iterator[str]:
        known = {name for param in self.params if not getattr(param, "is_flag", False) for name in param.opts}
        given = [part for arg in args for part in _parted(arg, known)]
        while given:
            arg = given.pop(0)
            name = arg if arg in known else OTHER_NAMES.get(arg, arg)
            if name == "--target" and name not in known and "model" in known:
                continue  # what follows is MODEL
            if name in LISTS and name in known and given:
                for each in given.pop(0).split(","):
                    yield from (name, each)
                continue
            yield name
            alone = not given or (given[0].startswith("-") and given[0] != "-")
            if name == "--json" and name in known and alone:
                yield "-"


def command(
    app: typer.Typer, name: str, *, examples: Sequence[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command of `app`.

    Parameters annotated with an options dataclass become one option per field. `BatonError` and bad paths end the
    program with one line and exit code 2, Ctrl-C with 130; `--debug` shows the traceback.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters, collect = expand(inspect.signature(function).parameters.values())
        parameters.append(Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug))

        @functools.wraps(function)
        def run(**values: Any) -> None:
            with exit_codes(debug=values.pop("debug")):
                function(**collect(values))

        # typer looks at both; neither may name the dataclasses, which it cannot read
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name, cls=Command, help=_unwrap(inspect.getdoc(function) or ""), epilog=_examples(examples))(run)
        return function

    return register


@contextlib.contextmanager
def exit_codes(*, debug: bool = False) -> Iterator[None]:
    """Errors raised on purpose, and what is wrong with a path, as one line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise  # the reader of a pipe has left: typer ends quietly
    except (BatonError, OSError) as error:
        if debug:
            raise
        fail(describe(error))


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or type(error).__name__}"
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Print the one red line and end the program."""
    err.print(f"[bold red]error:[/] [red]{escape(message)}[/]", soft_wrap=True, highlight=False)
    raise typer.Exit(code)


def _parted(arg: str, known: Collection[str]) -> Sequence[str]:
    """`--name=value` in two, where it is a list or JSON."""
    name, equals, value = arg.partition("=")
    return (name, value) if equals and name in known and name in (*LISTS, "--json") else (arg,)


def _examples(lines: Sequence[str]) -> str:
    return "\n".join(["[bold]Examples[/]", *(f"  [cyan]$[/] {escape(line)}" for line in lines)])


def _unwrap(text: str) -> str:
    """A docstring without the line breaks inside its paragraphs: the terminal has its own width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
