"""The command line, from help to whole runs on tiny models."""

import functools
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import tiny
import torch
import typer
from typer.testing import CliRunner, Result

import baton
from baton.cli import app
from baton.cli.app import ORDER
from baton.cli.command import Command, command
from baton.cli.options import Machine, expand, field_help, on_cli
from baton.cli.sources import check_source
from baton.errors import BatonError, DataError
from baton.handoff import evaluate
from baton.handoff.config import HandoffOptions
from baton.handoff.model import HandoffModel
from baton.train.options import TrainOptions
from baton.types import Output, Pair, Sampling

COMMANDS = [
    "generate",
    "train handoff",
    "eval handoff",
    "label",
    "bench decode",
    "bench forward",
    "bench scale",
    "bench handoff",
    "bench quality",
    "bench serve",
    "bench compare",
    "report",
    "warmup",
    "build-table",
    "calibrate-tree",
    "tune",
    "doctor",
    "audit",
    "demo",
    "info",
]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide and without colours, so that what is printed can be compared."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llm`, `slm`, `handoff` (untrained), and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in {"llm": tiny.t5(0), "slm": tiny.t5(1, num_layers=1, num_decoder_layers=1)}.items():
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    torch.manual_seed(0)
    options = HandoffOptions(zero_init=False)
    HandoffModel.build(llm=folder / "llm", slm=folder / "slm", options=options).save_pretrained(folder / "handoff")
    rows = [{"prompt": f"{prompt} {i}", "response": f"{i} {prompt}"} for i in range(4) for prompt in tiny.PROMPTS]
    write_jsonl(folder / "pairs.jsonl", rows)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments: Any, input: str | bytes | None = None, code: int = 0) -> Result:
    """Run a command and check its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=input)
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


def fails(*arguments: Any, input: str | bytes | None = None) -> str:
    """Run a command that must end with one line of error; returns it."""
    result = run(*arguments, input=input, code=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    return lines[0]


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(name: str) -> None:
    text = run(*name.split(), "--help").stdout
    assert "Examples" in text and f"baton {name}" in text.split("Examples")[1]
    assert "--debug" in text


def test_commands_are_listed_in_order() -> None:
    text = run("--help").stdout.split("Commands")[1].split("Examples")[0]
    found = [line.split()[1] for line in text.splitlines() if line.startswith("│ ") and line[2] != " "]
    assert found[:6] == ["generate", "train", "eval", "label", "bench", "report"]
    assert found == ORDER


@pytest.mark.parametrize(
    ("name", "cls"), [("generate", Sampling), ("generate", Machine), ("train handoff", HandoffOptions)]
)
def test_every_field_is_an_option_with_its_default_and_help(name: str, cls: type) -> None:
    text = " ".join(run(*name.split(), "--help").stdout.split())
    for each in on_cli(cls):
        flag = "--" + each.name.replace("_", "-")
        assert flag in text
        assert field_help(cls)[each.name].split(",")[0].split("(")[0].strip() in text
        if each.default is not None and not isinstance(each.default, bool):
            assert f"[default: {each.default}]" in text.split(flag, 1)[1][:400]


def test_version() -> None:
    assert run("--version").stdout == f"baton {baton.__version__}\n"


def test_help_imports_no_torch_and_is_quick() -> None:
    """What takes seconds to import is imported by the commands that need it."""
    code = "import sys, baton.cli; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules)); baton.cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert done.stdout.startswith("set()\n")
    assert "Think big, generate quick" in done.stdout


# --- options from dataclasses ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Example:
    """Every kind of field there is."""

    # not: a field
    size: int  # required: no default
    rate: float = 0.5  # a share, in [0, 1); see other_name
    name: Literal["one", "two"] = "one"  # which
    other_name: str | None = None
    words: tuple[str, ...] = ("a", "b")  # repeatable
    layer: int | float | str = "last"  # index, fraction or name
    on: bool = True  # on or off
    spaced: str = field(
        default="x",
        metadata={"help": "from the metadata"},
    )  # not from here

    def method(self, size: int) -> None:
        rate: int = 3  # of a method, not of the class
        assert size > rate


def example_app(seen: list[Any]) -> typer.Typer:
    def example(before: str, example: Example) -> None:
        """Do it."""
        seen.append((before, example))

    made = typer.Typer(rich_markup_mode="rich")
    command(made, "example", examples=["example"])(example)
    made.callback()(lambda: None)
    return made


def test_help_is_the_comment_at_the_end_of_a_fields_line() -> None:
    assert field_help(Example) == {
        "size": "required: no default",
        "rate": "a share, in [0, 1); see --other-name",
        "name": "which",
        "other_name": "",
        "words": "repeatable",
        "layer": "index, fraction or name",
        "on": "on or off",
        "spaced": "from the metadata",
    }
    assert all(field_help(cls)[f.name] for cls in (TrainOptions, Sampling) for f in on_cli(cls))


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ("", {}),
        ("--rate 1 --name two --no-on", {"rate": 1.0, "name": "two", "on": False}),
        ("--words c --words d", {"words": ("c", "d")}),
        ("--layer 3", {"layer": 3}),
        ("--layer 0.5", {"layer": 0.5}),
        ("--layer mix --other-name x", {"layer": "mix", "other_name": "x"}),
    ],
)
def test_options_become_the_dataclass(arguments: str, changes: dict[str, Any]) -> None:
    seen: list[Any] = []
    result = CliRunner().invoke(example_app(seen), ["example", "b", "--size", "7", *arguments.split()])
    assert result.exit_code == 0, result.output
    assert seen == [("b", Example(size=7, **changes))]
    assert type(seen[0][1].layer) is type(changes.get("layer", ""))


def test_a_default_instance_gives_the_defaults() -> None:
    parameter = Parameter("e", Parameter.KEYWORD_ONLY, default=Example(size=3, rate=0.25), annotation=Example)
    options, collect = expand([parameter])
    values = {option.name: option.default for option in options}
    assert (values["size"], values["rate"], values["words"]) == (3, 0.25, ["a", "b"])
    assert collect(values) == {"e": Example(size=3, rate=0.25)}


def test_a_required_field_is_a_required_option() -> None:
    result = CliRunner().invoke(example_app([]), ["example", "b"])
    assert result.exit_code == 2 and "--size" in result.stderr


# --- what is not known -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("generate x --temprature 1", "--temperature"),
        ("train handoff --slm-trainin full", "--slm-training"),
        ("generte x", "generate"),
        ("trian handoff", "train"),
        ("eval handof x", "handoff"),
        ("generate x --dtype flot32", "did you mean 'float32'?"),
        ("train handoff --llm a --slm b --data c --out d --fusion ad", "did you mean 'add'?"),
        ("eval handoff x --mode llmm", "did you mean 'llm'?"),
    ],
)
def test_the_nearest_known_name_is_shown(arguments: str, hint: str) -> None:
    assert hint in run(*arguments.split(), code=2).stderr


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("generate {models}/handof -p a", ["no folder", "did you mean 'handoff'?"]),
        ("generate ./nowhere -p a", ["no folder ./nowhere"]),
        ("generate {models}/pairs.jsonl -p a", ["is a file"]),
        ("generate {models}/llm", ["--prompt", "--input"]),
        ("generate {models}/llm -p a -i b", ["either"]),
        ("generate {models}/llm -p a -o b", ["--input"]),
        ("generate {models}/llm -p a -p -", ["stdin"]),
        ("generate {models}/llm -i {models}/pairs.jsonl", ["--output"]),
        ("generate {models}/llm -i {models}/none.txt -o {tmp}/o.jsonl", ["none.txt", "No such file"]),
        ("generate {models}/llm -p a --top-p 2", ["top_p=2.0", "(0, 1]"]),
        ("generate {models}/llm -p a --logit-bias e=much", ["e=much", "TEXT=NUMBER"]),
        ("generate {models}/llm -p a --logit-bias xyzzy=1", ["tokens here", "by id"]),
        ("generate {models}/llm -p a --device toaster", ["--device toaster"]),
        ("generate {models}/llm -p a --threads -1", ["--threads -1"]),
        ("generate {models}/llm -p a --llm {models}/slm", ["no hand-off"]),
        ("generate {models}/handoff -p a --llm {models}/slm", ["trained with the LLM"]),
        ("eval handoff {models}/llm", ["no hand-off"]),
        ("eval handoff {models}/handoff", ["--data"]),
        ("eval handoff {models}/handoff --json {tmp}", ["is a folder"]),
        ("label --llm {models}/llm --data {models}/none --out {tmp}/o", ["none", "No such file"]),
        ("demo --model {models}/none", ["config.json"]),
        ("demo --model models/none", ["models/none"]),
    ],
)
def test_bad_input_is_one_line(arguments: str, words: list[str], models: Path, tmp_path: Path) -> None:
    line = fails(*arguments.format(models=models, tmp=tmp_path).split())
    assert all(word in line for word in words), line


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_refused(prompt: str, models: Path) -> None:
    assert "prompt 0 is empty" in fails("generate", models / "llm", "--prompt", prompt)


def test_a_long_prompt_is_refused_or_cut(models: Path) -> None:
    prompt = "a b " * 600
    assert "--truncate" in fails("generate", models / "handoff", "-p", prompt, "--max-new-tokens", 2)
    run("generate", models / "handoff", "-p", prompt, "--max-new-tokens", 2, "--truncate")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', ["in.jsonl:2", "JSON"]),
        (b'{"prompt": "a"}\n{"promt": "b"}\n', ["in.jsonl:2", "did you mean 'prompt'?"]),
        (b'{"prompt": "a"}\n{"prompt": " "}\n', ["in.jsonl:2", "empty"]),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ["in.jsonl:2", "UTF-8"]),
        (b"", ["in.jsonl:1", "empty"]),
    ],
)
def test_malformed_input_names_file_and_line(content: bytes, words: list[str], models: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    line = fails("generate", models / "llm", "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out.jsonl").exists()


def test_stdin_that_is_not_utf8(models: Path) -> None:
    assert "UTF-8" in fails("generate", models / "llm", "-p", "-", input=b"caf\xe9\n")


def test_without_the_reference_models_demo_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(baton, "__file__", str(tmp_path / "site-packages" / "baton" / "__init__.py"))
    line = fails("demo")
    assert all(word in line for word in ["models/en-de-handoff is not here", "clone", "recipes/en_de.py", "--model"])


def error_app(error: BaseException) -> typer.Typer:
    def broken() -> None:
        """Fail."""
        raise error

    made = typer.Typer()
    command(made, "broken", examples=[])(broken)
    made.callback()(lambda: None)
    return made


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BatonError("several\n  lines [of] text"), "error: several lines [of] text"),
        (DataError("a.jsonl:3: bad"), "error: a.jsonl:3: bad"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "error: a.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", "b"), "error: b: Permission denied"),
    ],
)
def test_errors_become_one_line_and_debug_shows_where(error: Exception, line: str) -> None:
    result = CliRunner().invoke(error_app(error), ["broken"])
    assert (result.exit_code, result.stderr.strip()) == (2, line)
    assert CliRunner().invoke(error_app(error), ["broken", "--debug"]).exception is error


def test_a_bug_is_not_hidden() -> None:
    error = ZeroDivisionError("a bug")
    assert CliRunner().invoke(error_app(error), ["broken"]).exception is error


def test_ctrl_c_is_130() -> None:
    assert CliRunner().invoke(error_app(KeyboardInterrupt()), ["broken"]).exit_code == 130


def test_names_that_can_only_be_hub_ids_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "here").mkdir(parents=True)
    (tmp_path / "models" / "here" / "config.json").touch()
    (tmp_path / "google").mkdir()
    monkeypatch.chdir(tmp_path)
    check_source("gpt2", "google/flan-t5-small", "models/here", None)
    for name in ("models/hear", "./gpt2", "a/b/c", str(tmp_path / "no")):
        with pytest.raises(BatonError, match="no folder"):
            check_source(name)


# --- generate --------------------------------------------------------------------------------------------------------

GREEDY = ["--max-new-tokens", "8"]
DRAWN = [*GREEDY, "--temperature", "1", "--seed", "3"]


def test_one_prompt_is_streamed(models: Path) -> None:
    text = baton.generate(models / "handoff", ["Die Katze"], max_new_tokens=8)[0].text
    assert run("generate", models / "handoff", "-p", "Die Katze", *GREEDY).stdout == text + "\n"


def test_sampling_options_reach_the_engine(models: Path) -> None:
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=5)
    text = baton.generate(models / "llm", ["The cat"], sampling=sampling, max_new_tokens=8)[0].text
    flags = "--temperature 1.5 --top-k 50 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2 --seed 5"
    assert run("generate", models / "llm", "-p", "The cat", *flags.split(), *GREEDY).stdout == text + "\n"


def test_words_and_biases_reach_the_engine(models: Path) -> None:
    """A token is made certain, by its text and by its id; and then it is banned all the same."""
    arguments = ["generate", models / "llm", "-p", "The cat.", *GREEDY]
    token = tiny.tokenizer()("e", add_special_tokens=False)["input_ids"][-1]
    for name in ("e", str(token)):
        assert run(*arguments, "--logit-bias", f"{name}=1000").stdout.strip() == "e" * 8
    assert "eee" not in run(*arguments, "--logit-bias", "e=1000", "--bad-word", "e").stdout


def test_provenance_counts_what_each_drafter_guessed(models: Path) -> None:
    """The text is the same, and under it are the numbers that the JSON of the same answer has."""
    arguments = ["generate", models / "llm", "-p", "The cat.", "--max-new-tokens", "12", "--logit-bias", "e=1000"]
    drafter = ["--drafter", "mix:of=prompt-lookup+token-recycling,num_draft_tokens=6"]
    answer = json.loads(run(*arguments, *drafter, "--json").stdout)
    text, under = run(*arguments, *drafter, "--show-provenance").stdout.rstrip().rsplit("\n", 1)
    assert text == answer["text"]
    assert under.startswith(f"{answer['tokens']} tokens in {len(answer['steps'])} steps: ")
    shown = {name: (int(own), int(of)) for own, name, of in re.findall(r"(\d+) guessed by (\S+) of (\d+)", under)}
    guessed = Counter(source for source in answer["sources"] if source != "target")
    assert guessed and {name: own for name, (own, _) in shown.items() if own} == guessed
    assert sum(of for _, of in shown.values()) == sum(drafted for drafted, _, _ in answer["steps"])
    plain = run(*arguments, "--show-provenance").stdout
    assert plain.startswith(text) and "nothing was drafted" in plain


def test_json_has_prompt_text_reason_and_tokens(models: Path) -> None:
    prompts = ["The cat.", "Die Katze"]
    result = run("generate", models / "llm", "-p", prompts[0], "-p", prompts[1], "--json", *GREEDY)
    expected = [
        {"prompt": o.prompt, "text": o.text, "finish_reason": o.finish_reason, "tokens": len(o.token_ids)}
        for o in baton.generate(models / "llm", prompts, max_new_tokens=8)
    ]
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected


def test_stop_strings_end_an_answer(models: Path) -> None:
    text = baton.generate(models / "slm", ["The cat."], max_new_tokens=8)[0].text
    stop = text[2]
    result = run("generate", models / "slm", "-p", "The cat.", "--stop", stop, "--json", *GREEDY)
    row = json.loads(result.stdout)
    assert (row["text"], row["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_prompts_come_from_stdin(models: Path) -> None:
    result = run("generate", models / "llm", "-p", "-", "--json", *GREEDY, input="The cat.\n\nGröße\r\n".encode())
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["The cat.", "Größe"]


@pytest.mark.parametrize("mode", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_file_is_answered_and_continued(
    mode: list[str], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run keeps what was finished, and the next one makes the file that an undisturbed run makes."""
    arguments = ["generate", models / "llm", "-i", models / "pairs.jsonl", "--batch-size", 2, *mode]
    run(*arguments, "-o", tmp_path / "whole.jsonl")
    whole = read_jsonl(tmp_path / "whole.jsonl")
    prompts = [row["prompt"] for row in read_jsonl(models / "pairs.jsonl")]
    assert [row["prompt"] for row in whole] == prompts
    assert sorted(whole[0]) == ["finish_reason", "prompt", "text", "tokens"]

    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    generate = baton.generate
    out = tmp_path / "part.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(baton, "generate", interrupted)
        result = run(*arguments, "-o", out, code=130)
    assert f"{out} has 8 of 20 answers; the same command continues" in result.stderr
    assert read_jsonl(out) == whole[:8]

    with out.open("ab") as file:
        file.write(b'{"prompt": "cut off')
    assert f"continuing {out}: 8 of 20" in run(*arguments, "-o", out).stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert "nothing to do" in run(*arguments, "-o", out).stderr


def test_what_is_finished_in_order_is_kept(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a window: answers 0 and 1 can be written, 3 cannot before 2."""

    def interrupted(writer: Any, prompts: list[str], *, on_finish: Any, **options: Any) -> None:
        for index in (3, 1, 0):
            on_finish(Output(prompt=prompts[index], text=f"t{index}", token_ids=[5], finish_reason="eos"), index)
        raise KeyboardInterrupt

    monkeypatch.setattr(baton, "generate", interrupted)
    out = tmp_path / "out.jsonl"
    run("generate", models / "llm", "-i", models / "pairs.jsonl", "-o", out, *GREEDY, code=130)
    assert [row["text"] for row in read_jsonl(out)] == ["t0", "t1"]


def test_a_run_continues_in_the_middle_of_a_window(models: Path, tmp_path: Path) -> None:
    arguments = ["generate", models / "llm", "-i", models / "pairs.jsonl", "--batch-size", 2, *DRAWN]
    out = tmp_path / "out.jsonl"
    run(*arguments, "-o", out)
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:11]))
    run(*arguments, "-o", out)
    assert out.read_bytes() == whole


def test_a_sampled_file_does_not_depend_on_the_batch_size(models: Path, tmp_path: Path) -> None:
    """Each prompt draws by its number in the file, so windows and batches do not matter; neither does Python or CLI."""
    (tmp_path / "in.txt").write_text("The cat\n" * 8, encoding="utf-8")
    out = tmp_path / "out.jsonl"
    run("generate", models / "llm", "-i", tmp_path / "in.txt", "-o", out, "--batch-size", 1, *DRAWN)
    texts = [row["text"] for row in read_jsonl(out)]
    assert texts[:4] != texts[4:]
    run("generate", models / "llm", "-i", tmp_path / "in.txt", "-o", tmp_path / "8.jsonl", "--batch-size", 8, *DRAWN)
    assert [row["text"] for row in read_jsonl(tmp_path / "8.jsonl")] == texts


def test_another_files_answers_are_not_continued(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["generate", models / "llm", "-i", models / "pairs.jsonl", "-o", out, *GREEDY]
    write_jsonl(out, [{"prompt": "The cat. 0", "text": ""}, {"prompt": "another", "text": ""}])
    before = out.read_bytes()
    line = fails(*arguments)
    assert f"{out}:2: answers another prompt" in line and "--overwrite" in line
    out.write_bytes(b"not json\n")
    assert f"{out}:1: not valid JSON" in fails(*arguments)
    write_jsonl(out, [{"prompt": "x"}] * 21)
    assert "more than the 20 prompts" in fails(*arguments) or "another prompt" in fails(*arguments)
    out.write_bytes(before)
    run(*arguments, "--overwrite")
    assert len(read_jsonl(out)) == 20


def test_plain_text_has_a_line_per_answer(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("The cat\nDie Katze\n", encoding="utf-8")
    found = baton.generate(models / "llm", ["The cat", "Die Katze"], max_new_tokens=8)
    for each in found:
        each.text = f"first {each.text}\nsecond"

    def two_lines(writer: Any, prompts: list[str], *, on_finish: Any, **options: Any) -> None:
        for index, prompt in reversed(list(enumerate(prompts))):
            on_finish(next(each for each in found if each.prompt == prompt), index)

    monkeypatch.setattr(baton, "generate", two_lines)
    run("generate", models / "llm", "-i", source, "-o", out, *GREEDY)
    expected = [" ".join(each.text.splitlines()) for each in found]
    assert out.read_bytes().decode("utf-8") == "".join(line + "\n" for line in expected)
    out.write_bytes((expected[0] + "\n" + expected[1][:3]).encode("utf-8"))
    run("generate", models / "llm", "-i", source, "-o", out, *GREEDY)
    assert out.read_bytes().decode("utf-8") == "".join(line + "\n" for line in expected)


def test_a_prompt_too_long_is_known_before_anything_is_written(models: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": "short"}] * 9 + [{"prompt": "long " * 600}])
    out = tmp_path / "out.jsonl"
    line = fails("generate", models / "handoff", "-i", tmp_path / "in.jsonl", "-o", out, "--batch-size", 1, *GREEDY)
    assert "prompt 9 has" in line and not out.exists()


# --- label -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 2])
def test_labels_are_written_and_continued(beams: int, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    arguments = ["label", "--llm", models / "llm", "--data", models / "pairs.jsonl", "--num-beams", beams]
    arguments += ["--max-new-tokens", 4, "--batch-size", 8]
    assert f"wrote {out}: 20 pairs" in run(*arguments, "--out", out).stderr
    whole = read_jsonl(out)
    assert [row["prompt"] for row in whole] == [row["prompt"] for row in read_jsonl(models / "pairs.jsonl")]
    if beams == 1:
        expected = baton.generate(models / "llm", [row["prompt"] for row in whole], max_new_tokens=4)
        assert [row["response"] for row in whole] == [output.text for output in expected]
    write_jsonl(out, whole[:7])
    assert "7 were there" in run(*arguments, "--out", out).stderr
    assert read_jsonl(out) == whole
    write_jsonl(out, [{"prompt": "another", "response": "x"}])
    assert f"{out}:1" in fails(*arguments, "--out", out)
    run(*arguments, "--out", out, "--overwrite")
    assert read_jsonl(out) == whole


# --- train and eval --------------------------------------------------------------------------------------------------


def training(models: Path, out: Path) -> list[Any]:
    steps = ["--batch-size", 4, "--max-steps", 4, "--save-every", 2, "--eval-every", 2, "--validation-size", 4]
    arguments = ["train", "handoff", "--llm", models / "llm", "--slm", models / "slm", "--out", out, *steps]
    return [*arguments, "--data", models / "pairs.jsonl", "--max-quality-examples", 0, "--precision", "fp32"]


@pytest.fixture(scope="module")
def trained(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A hand-off trained by the command, and what the command said."""
    out = tmp_path_factory.mktemp("trained") / "handoff"
    result = run(*training(models, out), "--held-out", models / "pairs.jsonl", "--fusion", "replace")
    return out, result.stderr


def test_training_shows_its_plan_and_writes_a_handoff(trained: tuple[Path, str], models: Path) -> None:
    out, said = trained
    plan = re.sub(r"\s+", " ", said)
    model = HandoffModel.from_pretrained(out)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for words in [
        "61,824 parameters, encoder-decoder, frozen, read at layer last",
        "31,392 parameters, training: full",
        f"trainable {count:,} parameters, fusion: replace",
        "training pairs 16",
        "validation pairs 4",
        "steps 4 of 4 pairs (1.0 epochs)",
        "GiB on disk",
    ]:
        assert words in plan, plan
    assert model.config.handoff.fusion == "replace"
    assert (out / str(model.config.held_out)).resolve() == (models / "pairs.jsonl").resolve()


def test_a_finished_run_is_left_alone_and_another_folder_refused(
    trained: tuple[Path, str], models: Path, tmp_path: Path
) -> None:
    assert "nothing to do" in run(*training(models, trained[0])).stderr
    (tmp_path / "notes.txt").touch()
    line = fails(*training(models, tmp_path))
    assert "not empty" in line and "--overwrite" in line
    assert "is a file" in fails(*training(models, tmp_path / "notes.txt"))


def test_interrupted_training_says_how_to_continue_and_does(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.train.trainer import TextTrainer

    measure = TextTrainer.evaluate

    def press_ctrl_c(self: TextTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        return measure(self, *args, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TextTrainer, "evaluate", press_ctrl_c)
        result = run(*training(models, out), code=130)
    step = int(re.search(r"interrupted at step (\d), which is saved; the same command", result.stderr)[1])  # type: ignore[index]
    assert step in (2, 3) and not (out / "config.json").exists()
    assert "other settings" in fails(*training(models, out), "--learning-rate", 0.5)
    result = run(*training(models, out))
    assert f"continuing from step {step}" in re.sub(r"\s+", " ", result.stderr)
    assert HandoffModel.from_pretrained(out).config.handoff == HandoffOptions()


def test_overwrite_forgets_the_run_and_keeps_other_files(models: Path, tmp_path: Path) -> None:
    from baton.cli.train import prepare

    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    prepare(tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_too_few_pairs_for_a_batch(models: Path, tmp_path: Path) -> None:
    assert "--batch-size 64" in fails(*training(models, tmp_path / "run"), "--batch-size", 64)


@pytest.mark.parametrize(("training_of", "expected"), [("frozen", 2112), ("lora", 2112 + 24 * 64 * 2)])
def test_the_plan_counts_what_is_trained(training_of: Any, expected: int, models: Path) -> None:
    """Two linear maps of width 32 with biases; the adapter's rank times in + out features on top."""
    from baton.cli.train import plan
    from baton.handoff.model import with_adapter

    options = HandoffOptions(slm_training=training_of, lora_rank=2)
    pair = [Pair(prompt="a", response="b")]
    sources = {"llm": str(models / "llm"), "slm": str(models / "slm")}
    facts = plan(
        **sources, pairs=pair, validation=pair, options=options, train=TrainOptions(), revision=None, cache_gb=1
    )
    if training_of == "lora":
        slm = with_adapter(tiny.t5(1, num_layers=1, num_decoder_layers=1), options)
        expected = 2112 + sum(p.numel() for p in slm.parameters() if p.requires_grad)
    assert facts["trainable"] == f"{expected:,} parameters, fusion: add"


def test_the_split_shares_no_prompt() -> None:
    """All responses to a prompt are on one side, spelling variants included, and the same seed splits alike."""
    from baton.cli.train import split

    pairs = [
        Pair(prompt=p, response=f"{p}{i}") for i in range(3) for p in ("Go.", "go!", "Stay", "Stay?", "Run", "Sit")
    ]
    train, validation = split(pairs, 2, seed=1)
    keys = [{re.sub(r"\W", "", p.prompt).lower() for p in part} for part in (train, validation)]
    assert keys[0] | keys[1] == {"go", "stay", "run", "sit"} and not keys[0] & keys[1]
    assert len(keys[1]) == 2 and len(train) == 18 - 3 * len(validation)
    assert all(p.references == (f"{p.prompt}0", f"{p.prompt}1", f"{p.prompt}2") for p in validation)
    assert split(pairs, 2, seed=1) == (train, validation)
    assert len({p.prompt.strip(".!?").lower() for p in split(pairs, 0, seed=1)[1]}) == 1
    with pytest.raises(DataError, match="cannot spare 4"):
        split(pairs, 4, seed=1)


def test_eval_writes_every_number(trained: tuple[Path, str], models: Path, tmp_path: Path) -> None:
    quick = ["--limit", 3, "--speed-prompts", 2, "--repeats", 1, "--max-new-tokens", 4, "--slm", models / "slm"]
    out = tmp_path / "new" / "out.json"
    result = run("eval", "handoff", trained[0], *quick, "--json", out, "--report", tmp_path / "page")
    report = json.loads(out.read_text(encoding="utf-8"))
    for name in ("bleu", "chrf", "ms_per_token"):
        assert sorted(report[name]) == ["constant", "handoff", "llm", "shuffled", "slm", "zero"]
    assert {"speedup_decode", "speedup_total", "predicted_total", "machine", "versions"} <= set(report)
    assert report["settings"]["prompts"] == 3
    for words in ("SLM alone", "another prompt's Z", f"{report['ms_per_token']['llm']:.2f}"):
        assert words in result.stdout
    assert f"{report['ms_per_token']['llm']:.2f}" in (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "page" / "quality-speed.png").stat().st_size > 10_000


def test_eval_prints_json_alone_on_stdout(trained: tuple[Path, str], models: Path) -> None:
    quick = ["--limit", 2, "--speed-prompts", 2, "--repeats", 1, "--max-new-tokens", 4, "--mode", "handoff"]
    result = run("eval", "handoff", trained[0], *quick, "--data", models / "pairs.jsonl", "--json", "-")
    assert list(json.loads(result.stdout)["bleu"]) == ["handoff"]


def test_demo_prints_a_table_and_writes_a_report(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = functools.partial(evaluate.evaluate, max_new_tokens=4)  # an untrained model would write to the limit
    monkeypatch.setattr(evaluate, "evaluate", quick)
    result = run("demo", "--model", trained[0], "--sentences", 2)
    assert "hand-off" in result.stdout and "BLEU" in result.stdout and "reference" in result.stdout
    page = (tmp_path / "out" / "demo" / "report.md").read_text(encoding="utf-8")
    assert "| LLM |" in page and "quality-speed.png" in page
    assert (tmp_path / "out" / "demo" / "quality-speed.png").exists()


def test_info_as_json() -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["baton"] == baton.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert "torch" in run("info").stdout


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--rows", "1,2", "--rows=4", "--json"], ["--rows", "1", "--rows", "2", "--rows", "4", "--json", "-"]),
        (["--json", "--peer", "a,b"], ["--json", "-", "--peer", "a", "--peer", "b"]),
        (["--json", "out.json", "--target", "M"], ["--json", "out.json", "M"]),
        (["--json=-", "M", "--methods", "x:a=1,b=2"], ["--json", "-", "M", "--method", "x:a=1,b=2"]),
        (["--rows"], ["--rows"]),
    ],
)
def test_lists_with_commas_and_other_names_are_taken(given: list[str], taken: list[str]) -> None:
    made: Any = Command.__new__(Command)
    names = ("--rows", "--peer", "--json", "--method", "model")
    made.params = [SimpleNamespace(opts=[name], is_flag=False) for name in names]
    assert list(made._plain(given)) == taken
