"""The Tatoeba zip: pairs in file order, and a split that lets no test sentence into training."""

import random
import zipfile
from pathlib import Path

import pytest

from baton.data.tatoeba import read_tatoeba, sentence_key, split_tatoeba
from baton.errors import DataError
from baton.types import Pair


def archive(folder: Path, **files: str | bytes) -> Path:
    path = folder / "deu-eng.zip"
    with zipfile.ZipFile(path, "w") as made:
        for name, content in files.items():
            made.writestr(f"{name}.txt", content)
    return path


def test_pairs_in_file_order(tmp_path: Path) -> None:
    """The attribution column, and the files about the data, are not part of them."""
    path = archive(tmp_path, _about="Tatoeba", deu="Hi.\tHallo!\tCC-BY 2.0\nGo.\tGeh.\nHi.\tGrüß Gott!\n")
    assert read_tatoeba(path) == [
        Pair(prompt="Hi.", response="Hallo!"),
        Pair(prompt="Go.", response="Geh."),
        Pair(prompt="Hi.", response="Grüß Gott!"),
    ]


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"deu\.txt:2: expected two tab-separated columns, found 1"):
        read_tatoeba(archive(tmp_path, deu="Hi.\tHallo!\nGo.\n"))
    with pytest.raises(DataError, match="expected one language file"):
        read_tatoeba(archive(tmp_path, deu="", fra=""))
    with pytest.raises(DataError, match="expected one language file"):
        read_tatoeba(archive(tmp_path, _about=""))
    with pytest.raises(DataError, match="not UTF-8"):
        read_tatoeba(archive(tmp_path, deu=b"Hi.\tHall\xe4\n"))
    with pytest.raises(DataError, match="not a readable Tatoeba zip"):
        read_tatoeba(tmp_path / "none.zip")
    (tmp_path / "a.zip").write_text("Hi.\tHallo!\n")
    with pytest.raises(DataError, match="not a readable Tatoeba zip"):
        read_tatoeba(tmp_path / "a.zip")


def test_sentence_key() -> None:
    """Case, marks and spaces do not make another sentence; letters and digits do."""
    assert sentence_key("I don't know!") == sentence_key("i  dont know.") == "idontknow"
    assert sentence_key("STRASSE") == sentence_key("Straße")
    assert len({sentence_key(s) for s in ("It is 5.", "It is 6.", "Is it 5?")}) == 3


def corpus() -> list[Pair]:
    """Sentences of 3 to 9 words with 1 to 4 translations each, some in two spellings, mixed."""
    rng = random.Random(0)
    pairs = []
    for number in range(120):
        words = ["This", f"w{number}", *["is"] * (number % 7), "it"]
        spellings = [" ".join(words) + ".", " ".join(words).lower() + "!"]
        for translation in range(1 + number % 4):
            pairs.append(Pair(prompt=rng.choice(spellings), response=f"Das {number} {translation}"))
    pairs.append(pairs[-1])
    rng.shuffle(pairs)
    return pairs


def test_split_by_sentence() -> None:
    """No sentence, in any spelling, is on two sides; nothing is lost; every translation is a reference."""
    pairs = corpus()
    train, validation, test = split_tatoeba(pairs, held_out=20, validation=10, seed=3)
    assert (len(validation), len(test)) == (10, 20)
    sides = [{sentence_key(p.prompt) for p in side} for side in (train, validation, test)]
    assert [len(side) for side in sides] == [90, 10, 20]
    assert len(set.union(*sides)) == 120
    assert train == [p for p in pairs if sentence_key(p.prompt) in sides[0]]
    for pair in validation + test:
        assert len(pair.prompt.split()) >= 6
        same = [p for p in pairs if sentence_key(p.prompt) == sentence_key(pair.prompt)]
        assert pair.prompt == same[0].prompt
        assert pair.response == same[0].response
        assert pair.references == tuple(dict.fromkeys(p.response for p in same))


def test_split_is_the_same_for_a_seed() -> None:
    """Whatever the order of the file says about the sentences held out."""
    pairs = corpus()
    test = split_tatoeba(pairs, held_out=20, validation=10)[2]
    assert split_tatoeba(pairs, held_out=20, validation=10)[2] == test
    keys = [sentence_key(p.prompt) for p in test]
    assert [sentence_key(p.prompt) for p in split_tatoeba(pairs[::-1], held_out=20, validation=10)[2]] == keys
    assert [sentence_key(p.prompt) for p in split_tatoeba(pairs, held_out=20, validation=10, seed=1)[2]] != keys


def test_too_few_sentences() -> None:
    with pytest.raises(DataError, match="only 68 sentences of 6 words or more: ask for a smaller split"):
        split_tatoeba(corpus(), held_out=60, validation=9)
