"""Make the benchmark's own suites, from data that no reference model was trained on.

    python recipes/suites.py --data deu-eng.zip --gsm8k test.jsonl

`code`: beginnings of functions of the Python standard library, from the files that `recipes/pycode.py` holds out.
`edit`: such functions whole, to be written again with a name changed: most of the answer is in the prompt.
`translate`: English sentences of the test split of `recipes/en_de.py`, with every accepted German translation.
`math`: word problems of GSM8K's test split, with worked answers.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from edits import functions, names, renamed
from pycode import Recipe

from baton.bench.suites import FOLDER, Suite, Task, write_suite
from baton.data.tatoeba import read_tatoeba, split_tatoeba

VERSION = "1"
COUNTS = {"code": 100, "edit": 100, "translate": 200, "math": 100}
LIBRARY = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library"


def code(found: list[list[str]]) -> Iterator[Task]:
    for lines in found:
        yield Task(prompt="\n".join(lines[: max(4, len(lines) // 3)]) + "\n")


def edit(found: list[list[str]]) -> Iterator[Task]:
    for lines in found:
        text = "\n".join(lines)
        if frequent := names(text):
            prompt, answer = renamed(text, frequent[0], f"new_{frequent[0]}")
            yield Task(prompt=prompt, references=(answer,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="deu-eng.zip")
    parser.add_argument("--gsm8k", type=Path, required=True, help="test.jsonl of GSM8K (MIT)")
    args = parser.parse_args()
    chance = random.Random(0)
    found = list(functions(Recipe(Path()).held_out))
    chance.shuffle(found)
    test = split_tatoeba(read_tatoeba(args.data))[2]
    pairs = chance.sample(test, COUNTS["translate"])
    problems = [
        Task(prompt=f"Question: {row['question']}\nAnswer:", references=(f" {row['answer']}",))
        for row in map(json.loads, args.gsm8k.read_text(encoding="utf-8").splitlines())
    ]
    chance.shuffle(problems)
    tatoeba = "Tatoeba English-German (tatoeba.org, through manythings.org/anki)"
    for name, source, licence, tasks in (
        ("code", LIBRARY, "PSF-2.0", list(code(found))),
        ("edit", LIBRARY, "PSF-2.0", list(edit(found))),
        ("translate", tatoeba, "CC-BY-2.0", [Task(prompt=p.prompt, references=p.accepted) for p in pairs]),
        ("math", "GSM8K, test split (github.com/openai/grade-school-math)", "MIT", problems),
    ):
        chosen = tuple(tasks[: COUNTS[name]])
        write_suite(
            Suite(name=name, version=VERSION, source=source, licence=licence, tasks=chosen), FOLDER / f"{name}.jsonl"
        )


if __name__ == "__main__":
    main()
