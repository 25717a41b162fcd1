"""Options dataclasses as command-line options: names, defaults and help are read from the class, typed nowhere else."""

import dataclasses
import functools
import inspect
import io
import itertools
import logging
import os
import re
import sys
import tokenize
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from baton.errors import BatonError, nearest
from baton.types import RuntimeName

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Idle = Literal["spin", "sleep"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a model runs."""

    dtype: Dtype = "auto"  # number type of the weights; auto is the one they are stored in
    device: str | None = None  # cpu, cuda, cuda:1, mps; by itself: the first GPU, or the CPU where there is none
    runtime: RuntimeName = "auto"  # how forwards are made fast; eager is transformers' own
    threads: int = 0  # CPU threads; 0 leaves the choice to PyTorch
    idle: Idle = "spin"  # what they do between passes: spin, to start at once; sleep leaves a shared machine's cores

    def __post_init__(self) -> None:
        """Here, not in `prepare`: OpenMP reads the variable when PyTorch is imported, and options come before that."""
        if self.idle == "sleep":
            os.environ["OMP_WAIT_POLICY"] = "passive"
            if "torch" in sys.modules:
                log.warning("--idle sleep comes too late, PyTorch is imported already: set OMP_WAIT_POLICY=passive")

    def prepare(self) -> None:
        """Set the number of CPU threads and see that the device is there, before any model is loaded.

        Raises: BatonError for a device that is not known or not here.
        """
        import torch

        set_threads(self.threads)
        if self.device is None:
            return
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            why = str(error).strip().splitlines()[0]
            raise BatonError(f"--device {self.device} cannot be used: {why}") from error


def set_threads(threads: int) -> None:
    """CPU threads for PyTorch; 0 leaves its choice."""
    import torch

    if threads < 0:
        raise BatonError(f"--threads {threads} is not possible: give 1 or more, or 0 for PyTorch's choice")
    if threads:
        torch.set_num_threads(threads)


def expand(parameters: Iterable[Parameter]) -> tuple[list[Parameter], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Replace each parameter annotated with an options dataclass by one option per field.

    Args:
        parameters: of a command's function; a default that is an instance gives the fields their defaults.
    Returns: parameters for typer, all keyword-only; and the way back, from their values to the function's arguments.
    Raises: what the dataclass raises for values it refuses, on the way back.
    """
    expanded: list[Parameter] = []
    groups: dict[str, type] = {}
    for parameter in parameters:
        cls: Any = parameter.annotation
        if isinstance(cls, type) and dataclasses.is_dataclass(cls):
            groups[parameter.name] = cls
            default = None if parameter.default is Parameter.empty else parameter.default
            expanded += _field_options(cls, default, panel=_panel(parameter.name))
        else:
            expanded.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))
    names = [p.name for p in expanded]
    assert len(set(names)) == len(names), f"an option is defined twice: {sorted(names)}"

    def collect(values: dict[str, Any]) -> dict[str, Any]:
        for name, cls in groups.items():
            hints = get_type_hints(cls)
            fields = {f.name: _from_cli(values.pop(f.name), hints[f.name]) for f in on_cli(cls)}
            values[name] = cls(**fields)
        return values

    return expanded, collect


def one_of(known: Iterable[str]) -> Callable[[Any], Any]:
    """A callback for typer that accepts the known names only, and shows the nearest to any other."""
    names = tuple(known)

    def check(value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value or ():
            if name not in names:
                raise typer.BadParameter(f"{name!r} is not known, {nearest(name, names)} (of {', '.join(names)})")
        return value

    return check


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """What each field means: `metadata["help"]`, or else the comment that ends the field's line."""
    found: dict[str, str] = {}
    source = inspect.cleandoc("\n" + inspect.getsource(cls))
    # A field's line is `name: type ...  # help`, directly in the class; all else is passed over.
    depth, field, start = 0, "", True
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, after in itertools.pairwise(tokens):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            depth += 1 if token.type == tokenize.INDENT else -1
        elif token.type == tokenize.NEWLINE:
            field, start = "", True
        elif token.type == tokenize.COMMENT and field:
            found.setdefault(field, token.string.removeprefix("#").strip())
        elif token.type not in (tokenize.NL, tokenize.COMMENT):
            if start and depth == 1 and token.type == tokenize.NAME and after.string == ":":
                field = token.string
            start = False
    fields = {f.name: f for f in dataclasses.fields(cls)}
    texts = {name: fields[name].metadata.get("help", found.get(name, "")) for name in fields}
    # Fields that name each other do so as the options they have become.
    names = re.compile("|".join(rf"\b{name}\b" for name in fields if "_" in name) or "(?!)")
    return {name: names.sub(lambda m: "--" + m[0].replace("_", "-"), text) for name, text in texts.items()}


def on_cli(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields that have a form as an option; others say so with `metadata={"cli": False}`."""
    return [field for field in dataclasses.fields(cls) if field.metadata.get("cli", True)]


def _panel(name: str) -> str:
    return f"{name.replace('handoff', 'hand-off').replace('_', ' ').capitalize()} options"


def _field_options(cls: type, instance: Any, *, panel: str) -> list[Parameter]:
    hints, texts = get_type_hints(cls), field_help(cls)
    parameters = []
    for field in on_cli(cls):
        hint = hints[field.name]
        annotation, metavar, check = _to_cli(hint)
        default = field.default if instance is None else getattr(instance, field.name)
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        flag = "--" + field.name.replace("_", "-")
        if hint is bool:
            flag = f"{flag}/--no-{flag[2:]}"
        elif not required and annotation is not bool and isinstance(default, tuple):
            default = list(default)
        elif not required and annotation in (str, str | None) and default is not None:
            default = str(default)
        option = typer.Option(
            flag,
            help=escape(_with_names(texts.get(field.name, ""), hint)),
            metavar=metavar,
            callback=check,
            rich_help_panel=panel,
        )
        parameters.append(
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if required else default,
                annotation=Annotated[annotation, option],
            )
        )
    return parameters


def _with_names(text: str, hint: Any) -> str:
    """Help that lists the names a field takes, where its own text does not name them all."""
    names = [str(name) for name in get_args(hint)] if get_origin(hint) is Literal else []
    if all(name in text for name in names):
        return text
    return f"{text}; one of {', '.join(names)}".removeprefix("; ")


def _to_cli(hint: Any) -> tuple[Any, str | None, Callable[[Any], Any] | None]:
    """A field's type as typer's annotation, what the help calls its value, and a check of the value."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return str, "NAME", one_of(map(str, arguments))
    if origin is tuple:
        inner, metavar, check = _to_cli(arguments[0])
        return list[inner], metavar, check  # type: ignore[valid-type]
    if origin in (Union, types.UnionType):
        some = [a for a in arguments if a is not type(None)]
        if len(some) == 1:
            inner, metavar, check = _to_cli(some[0])
            return inner | None, metavar, check
        parts = ["|".join(get_args(a)) if get_origin(a) is Literal else a.__name__ for a in some]
        return (str | None if type(None) in arguments else str), "|".join(parts), None
    if hint in (str, int, float, bool, Path):
        return hint, None, None
    raise TypeError(f"no command-line form for a field of type {hint}")


def _from_cli(value: Any, hint: Any) -> Any:
    """The inverse: lists to tuples, and numbers where the field takes several types."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        return tuple(value or ())
    if isinstance(value, str) and get_origin(hint) in (Union, types.UnionType):
        for number in (int, float):
            if number in arguments:
                try:
                    return number(value)
                except ValueError:
                    continue
    return value
