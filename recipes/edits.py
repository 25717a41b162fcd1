"""Functions of a source text, and how they are to be written again: what the `edit` suite asks, and training for it."""

import ast
import keyword
import random
import re
from collections.abc import Iterable, Iterator

OTHER_NAMES = "first", "item", "target", "source", "current", "entry", "result_of", "given", "inner", "chosen"


def functions(texts: Iterable[str]) -> Iterator[list[str]]:
    """The lines of each top-level function and class of 8 to 40 lines."""
    for text in texts:
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno is not None:
                found = lines[node.lineno - 1 : node.end_lineno]
                if 8 <= len(found) <= 40 and max(map(len, found)) < 100:
                    yield found


def names(text: str) -> list[str]:
    """Names that occur often enough to be worth renaming, in order of appearance."""
    found = re.findall(r"\b[a-z_]{3,}\b", text)
    return [n for n in dict.fromkeys(found) if found.count(n) >= 3 and not keyword.iskeyword(n) and n != "self"]


def renamed(text: str, old: str, new: str) -> tuple[str, str]:
    """The function, what is asked, and the answer's first line; and the rest of the answer."""
    first, rest = re.sub(rf"\b{old}\b", new, text).split("\n", 1)
    return f"{text}\n\n\n# The same again, with {old} renamed to {new}.\n{first}\n", f"{rest}\n"


def copies(texts: Iterable[str], *, count: int, seed: int) -> Iterator[str]:
    """Lines that have nothing to do with each other, and the same again: only looking back tells what comes next."""
    chance = random.Random(seed)
    lines = [line for text in texts for line in text.splitlines() if line.strip() and len(line) < 100]
    for _ in range(count):
        text = "\n".join(chance.choices(lines, k=chance.randint(8, 16)))
        yield f"{text}\n\n\n# The same again.\n{text}\n"


def examples(texts: Iterable[str], *, seed: int) -> Iterator[str]:
    """One text per function: an edit and its answer, or where nothing can be renamed the function twice."""
    chance = random.Random(seed)
    for lines in functions(texts):
        text = "\n".join(lines)
        if frequent := names(text):
            old = chance.choice(frequent)
            new = f"{chance.choice(('new', 'new', 'old', 'my', 'the'))}_{old}"
            yield "".join(renamed(text, old, chance.choice((new, new, chance.choice(OTHER_NAMES)))))
        else:
            yield f"{text}\n\n\n# The same again.\n{text}\n"
