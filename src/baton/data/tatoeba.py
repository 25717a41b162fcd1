"""Tatoeba sentence pairs from a manythings.org zip: reader and leak-free split.

Source: tatoeba.org through manythings.org/anki, CC BY 2.0 (attribution in the zip's `_about.txt`).
"""

import random
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from baton.errors import DataError
from baton.types import Pair


def read_tatoeba(path: str | Path) -> list[Pair]:
    """All pairs of the one tab-separated language file in a zip, in file order.

    Raises: DataError when the file is no zip, holds no language file or a row has fewer than two columns.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".txt") and not n.startswith("_")]
            if len(names) != 1:
                raise DataError(f"{path}: expected one language file (such as deu.txt) in the zip, found {names}")
            text = archive.read(names[0]).decode("utf-8")
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a readable Tatoeba zip ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the language file is not UTF-8 ({error})") from error
    pairs = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        columns = line.rstrip("\r").split("\t")
        if len(columns) < 2:
            raise DataError(f"{path}/{names[0]}:{number}: expected two tab-separated columns, found {len(columns)}")
        pairs.append(Pair(prompt=columns[0], response=columns[1]))
    return pairs


def sentence_key(sentence: str) -> str:
    """What counts as the same sentence: letters and digits only, case folded."""
    return re.sub(r"\W+", "", sentence).casefold()


def split_tatoeba(
    pairs: Sequence[Pair], *, held_out: int = 2000, validation: int = 1000, min_words: int = 6, seed: int = 0
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Train, validation and test pairs, split by source sentence.

    One sentence has several translations: all go to the same side, also across spelling variants
    (`sentence_key`), so no test sentence is seen in training. Test and validation hold one pair per
    sentence of at least `min_words` words, with every translation in `references`.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(sentence_key(pair.prompt), []).append(pair)
    long_enough = sorted(k for k, g in groups.items() if len(g[0].prompt.split()) >= min_words)
    random.Random(seed).shuffle(long_enough)
    if len(long_enough) < held_out + validation:
        raise DataError(f"only {len(long_enough)} sentences of {min_words} words or more: ask for a smaller split")
    test_keys, validation_keys = long_enough[:held_out], long_enough[held_out : held_out + validation]
    kept_out = set(test_keys) | set(validation_keys)

    def one(key: str) -> Pair:
        group = groups[key]
        answers = tuple(dict.fromkeys(p.response for p in group))
        return Pair(prompt=group[0].prompt, response=answers[0], references=answers)

    train = [p for p in pairs if sentence_key(p.prompt) not in kept_out]
    return train, [one(k) for k in validation_keys], [one(k) for k in test_keys]
