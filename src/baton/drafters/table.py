"""The methods by name, loaded when asked for, and their options from text."""

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING, Any

from baton.errors import UnknownOption, nearest

if TYPE_CHECKING:  # this table is read by the command line's help, which loads no PyTorch
    from baton.engine.drafter import Drafter

METHODS = {
    "plain": "baton.engine.drafter:Drafter",
    "prompt-lookup": "baton.drafters.prompt_lookup:PromptLookup",
    "draft-model": "baton.drafters.draft_model:DraftModel",
    "handoff": "baton.drafters.handoff:HandoffDrafter",
    "token-recycling": "baton.drafters.token_recycling:TokenRecycling",
    "layerskip": "baton.drafters.layerskip:LayerSkip",
    "del": "baton.drafters.dynamic_exit:DynamicExit",
    "aded": "baton.drafters.aded:Aded",
    "stand": "baton.drafters.stand:Stand",
    "rest": "baton.drafters.rest:Rest",
    "rasd": "baton.drafters.rasd:Rasd",
    "rsd-c": "baton.drafters.rsd:ConstantBranching",
    "rsd-s": "baton.drafters.rsd:StochasticBeams",
    "dyspec": "baton.drafters.dyspec:DySpec",
    "pearl": "baton.drafters.pearl:Pearl",
    "mix": "baton.drafters.mix:Mix",
    "controller": "baton.drafters.controller:Controller",
}
# Those that need nothing but the target.
WITHOUT_MODEL = ["prompt-lookup", "token-recycling"]


def every(*, small: str | None = None, datastore: str | None = None, table: str | None = None) -> list[str]:
    """Each method once, as far as what it needs is given.

    Args:
        small: folder or Hub id of a small model; datastore, table: folders that `baton build-datastore` and `baton
            build-table` have written.
    """
    found = [*WITHOUT_MODEL, "layerskip", "del", "stand", f"aded:table={table}" if table else "aded"]
    tree = f"draft-model:model={small},branches=4,num_draft_tokens=16"
    if small:
        found += [f"{name}:model={small}" for name in ("draft-model", "rsd-c", "rsd-s", "pearl")]
        found += [f"dyspec:model={small},num_draft_tokens=0", tree]
    if datastore:
        found += [f"rest:datastore={datastore}"]
    if small and datastore:
        found += [f"rasd:base=[{tree}],datastore={datastore}"]
    parts = [*WITHOUT_MODEL, *([f"[rest:datastore={datastore},num_draft_tokens=16]"] if datastore else [])]
    return [*found, f"mix:of={'+'.join(parts)}", "controller"]


def method(name: str) -> "type[Drafter]":
    """The class of a method. Raises: UnknownOption."""
    if name not in METHODS:
        raise UnknownOption(f"no drafting method {name!r}: {nearest(name, METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)


def make(spec: str) -> "Drafter":
    """A drafter from `name` or `name:key=value,key=value`; a value that is such a text itself stands in brackets.

    For example `rasd:base=[draft-model:model=DIR,branches=4]`.

    Raises: UnknownOption for a method or an option that does not exist, or a value that does not fit.
    """
    name, _, rest = spec.partition(":")
    kind = method(name.strip())
    fields = options(kind)
    values: dict[str, Any] = {}
    for part in filter(None, split(rest, ",")):
        key, equals, text = part.partition("=")
        key = key.strip().replace("-", "_")
        if key not in fields:
            raise UnknownOption(f"{name} has no option {key!r}: {nearest(key, fields)}")
        values[key] = _value(f"{name}:{key}", text.strip() if equals else "true", fields[key].default)
    return kind(**values)


def split(text: str, separator: str) -> list[str]:
    """Parts of a text, not parted inside brackets, in the order they stand in.

    Raises: UnknownOption where brackets do not close.
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if depth < 0:
            break
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise UnknownOption(f"{text!r}: brackets do not close")
    return parts


def bare(text: str) -> str:
    """A value without the brackets around it."""
    text = text.strip()
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def options(kind: "type[Drafter]") -> dict[str, dataclasses.Field[Any]]:
    """The options of a method by name."""
    return {f.name: f for f in dataclasses.fields(kind) if f.init} if dataclasses.is_dataclass(kind) else {}


def _value(where: str, text: str, default: Any) -> Any:
    """Text as the type of the option's default."""
    try:
        if isinstance(default, bool):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        return type(default)(bare(text))
    except (KeyError, ValueError):
        raise UnknownOption(f"{where}={text!r} is not a {type(default).__name__}") from None
