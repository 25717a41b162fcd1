"""Reading data and writing files: every row arrives as it is, every fault is located, nothing is lost."""

import errno
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import PreTrainedTokenizerFast

from baton.data import storage
from baton.data.formats import read_pairs, read_prompts, render
from baton.data.storage import PARTIAL, READY, append_jsonl, atomic_folder, atomic_write, completed_lines, settle
from baton.errors import DataError, StorageError
from baton.train.tokenizers import train_bpe
from baton.types import Pair


@pytest.fixture
def save(tmp_path: Path) -> Any:
    """Write text or bytes to a file of the test and return its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path

    return write


def rows(*values: Any) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def chat(*turns: str) -> dict[str, Any]:
    """`chat("user: Hi", "assistant: Yes")` as a row."""
    return {"messages": [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]}


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_jsonl_pairs(save) -> None:
    """Order, duplicates, spaces, line separators inside text and extra fields survive; blank lines do not matter."""
    hello = {"prompt": "Hello", "response": "Hallo", "id": 7}
    odd = {"prompt": " a\u2028b\n", "response": "日本 \U0001f600 \x85"}
    path = save("a.jsonl", rows(hello) + "\n" + rows(odd, hello))
    expected = [Pair(prompt="Hello", response="Hallo"), Pair(prompt=odd["prompt"], response=odd["response"])]
    assert read_pairs(path) == ([*expected, expected[0]], 0)


def test_references_include_the_response(save) -> None:
    path = save("a.jsonl", rows({"prompt": "a", "response": "x", "references": ["y", "x", "y"]}))
    [pair], _ = read_pairs(path)
    assert pair.references == ("x", "y")
    path = save("a.jsonl", rows({"prompt": "a", "response": "x", "references": []}))
    assert read_pairs(path)[0][0].accepted == ("x",)


def test_empty_responses_are_counted_and_skipped(save) -> None:
    path = save("a.jsonl", rows(*({"prompt": "a", "response": text} for text in ("x", "", " \t", "y"))))
    pairs, skipped = read_pairs(path)
    assert [p.response for p in pairs] == ["x", "y"]
    assert skipped == 2


def test_windows_files(save) -> None:
    """A byte order mark and CRLF are not part of the text."""
    text = '{"prompt": "ä", "response": "b"}\r\n{"prompt": "c", "response": "d"}\r\n'
    expected = [Pair(prompt="ä", response="b"), Pair(prompt="c", response="d")]
    assert read_pairs(save("a.jsonl", b"\xef\xbb\xbf" + text.encode()))[0] == expected
    assert read_pairs(save("a.tsv", b"\xef\xbb\xbf\xc3\xa4\tb\r\nc\td\r\n"))[0] == expected


def test_tsv_pairs(save) -> None:
    """No quoting, no stripping, a header of the two names is none of the pairs, an empty response is skipped."""
    path = save("a.tsv", 'prompt\tresponse\nI say "hi"\t"Hallo"\n\nb \t \nprompt\tresponse\n')
    pairs, skipped = read_pairs(path)
    assert pairs == [Pair(prompt='I say "hi"', response='"Hallo"'), Pair(prompt="prompt", response="response")]
    assert skipped == 1


def test_an_unknown_ending_is_looked_into(save) -> None:
    assert read_pairs(save("a.data", '\n {"prompt": "a", "response": "b"}'))[0] == [Pair(prompt="a", response="b")]
    assert read_pairs(save("a.txt", "a\tb"))[0] == [Pair(prompt="a", response="b")]
    assert read_pairs(save("a.tsv", "{a\tb"))[0] == [Pair(prompt="{a", response="b")]


def test_tatoeba_zip(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deu.txt", "Hi.\tHallo!\tCC-BY\nHi.\t\nGo.\tGeh.\n")
    assert read_pairs(path) == ([Pair(prompt="Hi.", response="Hallo!"), Pair(prompt="Go.", response="Geh.")], 1)
    assert read_prompts(path) == ["Hi.", "Go."]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("deu.txt", "Hi.\tHallo!\n \tGeh.\n")
    with pytest.raises(DataError, match=r"a\.zip:2: the prompt is empty"):
        read_pairs(path)


ROW = '{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", ROW + '{"prompt": "ä"'.replace("ä", "\udce4"), "a.jsonl:2: not UTF-8 (byte 0xe4 at position 12)"),
        ("a.jsonl", "\udcff\udcfe{\0}\0", "a.jsonl:1: not UTF-8 (byte 0xff at position 0)"),
        ("a.jsonl", ROW + ROW[:-2], "a.jsonl:2: not valid JSON (Expecting ',' delimiter, column 32)"),
        ("a.jsonl", ROW * 2 + "hello\n", "a.jsonl:3: not valid JSON (Expecting value, column 1): one object per line"),
        ("a.json", "[\n" + ROW + "]", "a.json:1: not valid JSON"),
        ("a.jsonl", ROW + "[" * 100_000, "a.jsonl:2: not usable JSON"),
        ("a.jsonl", ROW + '{"prompt": ' + "1" * 5000 + "}", "a.jsonl:2: not usable JSON"),
        ("a.jsonl", ROW + '{"prompt": "\\ud800", "response": "b"}', "a.jsonl:2: holds half of a surrogate pair"),
        ("a.jsonl", ROW + '["a", "b"]', 'a.jsonl:2: expected an object such as {"prompt": ...}, found a list'),
        ("a.jsonl", ROW + "null", 'a.jsonl:2: expected an object such as {"prompt": ...}, found null'),
        (
            "a.jsonl",
            "\n" + '{"prompt": "a", "reponse": "b"}',
            "a.jsonl:2: no 'response', but 'reponse': did you mean 're",
        ),
        ("a.jsonl", '{"Prompt": "a", "response": "b"}', "a.jsonl:1: no 'prompt', but 'Prompt': did you mean 'prompt'?"),
        ("a.jsonl", '{"mesages": []}', "a.jsonl:1: neither 'prompt' and 'response' nor 'messages', but 'mesages': did"),
        ("a.jsonl", '{"question": "a", "answer": "b"}', "nor 'messages'; found 'question', 'answer'"),
        ("a.jsonl", "{}", "a.jsonl:1: neither 'prompt' and 'response' nor 'messages'; found no fields"),
        ("a.jsonl", '{"prompt": "a"}', "a.jsonl:1: no 'response'; found 'prompt'"),
        ("a.jsonl", '{"prompt": 5, "response": "b"}', "a.jsonl:1: 'prompt' must be text, is a number"),
        ("a.jsonl", '{"prompt": "a", "response": null}', "a.jsonl:1: 'response' must be text, is null"),
        ("a.jsonl", '{"prompt": "a", "response": ["b"]}', "a.jsonl:1: 'response' must be text, is a list"),
        ("a.jsonl", ROW + '{"prompt": " ", "response": "b"}', "a.jsonl:2: the prompt is empty"),
        ("a.jsonl", ROW[:-2] + ', "references": "b"}', "a.jsonl:1: 'references' must be a list of texts, is text"),
        ("a.jsonl", ROW[:-2] + ', "references": ["b", 1]}', "a.jsonl:1: 'references[1]' must be text, is a number"),
        ("a.jsonl", ROW[:-2] + ', "references": [""]}', "a.jsonl:1: 'references[0]' must be text, is empty"),
        (
            "a.jsonl",
            ROW[:-2] + ', "reference": ["b"]}',
            "a.jsonl:1: unknown field 'reference': did you mean 'references'",
        ),
        ("a.jsonl", '{"messages": {}}', "a.jsonl:1: 'messages' must be a list, is an object"),
        (
            "a.jsonl",
            '{"messages": ["a"]}',
            "a.jsonl:1: messages[0] must be an object with 'role' and 'content', is text",
        ),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "a.jsonl:1: messages[0]: no 'content'; found 'role'"),
        ("a.jsonl", '{"messages": [{"role": "user", "contnt": "a"}]}', "messages[0]: no 'content', but 'contnt': did"),
        ("a.jsonl", rows(chat("usr: a", "assistant: b")), "messages[0]: role 'usr' is not known: did you mean 'user'?"),
        ("a.jsonl", rows(chat("user: a")), "a.jsonl:1: no assistant message, so no response"),
        ("a.jsonl", rows(chat("assistant: b")), "a.jsonl:1: the prompt is empty"),
        ("a.jsonl", rows(chat("user:  ", "assistant: b")), "a.jsonl:1: the prompt is empty"),
        ("a.jsonl", "", "a.jsonl:1: the file is empty"),
        ("a.jsonl", "\n \n", "a.jsonl:1: the file is empty"),
        ("a.jsonl", rows({"prompt": "a", "response": ""}), "a.jsonl:1: no pair to use: all 1 responses are empty"),
        ("a.tsv", "prompt\tresponse\n", "a.tsv:1: no pair to use: no rows"),
        ("a.tsv", "a\tb\nc\n", "a.tsv:2: expected prompt, tab, response: found 1 columns, not 2"),
        ("a.tsv", "a\tb\nc\td\te\n", "a.tsv:2: expected prompt, tab, response: found 3 columns, not 2"),
        ("a.tsv", "a\tb\n\tc\n", "a.tsv:2: the prompt is empty"),
        ("a.tsv", "a\tb\n\t\n", "a.tsv:2: the prompt is empty"),
        ("a.zip", "not a zip", "a.zip: not a readable Tatoeba zip"),
    ],
)
def test_faults_are_located(save, tmp_path: Path, name: str, content: str, expected: str) -> None:
    """The message starts with file and line, and says what is wrong there."""
    path = save(name, content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path)


# --- messages --------------------------------------------------------------------------------------------------------


def test_messages_plainly(save) -> None:
    """One message is its text; several are told apart by their roles; what follows the last answer is not used."""
    path = save(
        "a.jsonl",
        rows(
            chat("user: Hi", "assistant: Hallo"),
            chat("system: Be brief.", "user: Hi", "assistant: Hm?", "user: Bye", "assistant: Tschüss", "user: So?"),
            chat("user: Hi", "assistant: "),
        ),
    )
    pairs, skipped = read_pairs(path)
    assert pairs == [
        Pair(prompt="Hi", response="Hallo"),
        Pair(
            prompt="System: Be brief.\nUser: Hi\nAssistant: Hm?\nUser: Bye\nAssistant:",
            response="Tschüss",
        ),
    ]
    assert skipped == 1


def test_prompt_and_response_win_over_messages(save) -> None:
    """Some data sets have a `prompt` beside `messages`: without a `response`, the messages are the pair."""
    both = {"prompt": "p", **chat("user: Hi", "assistant: Hallo")}
    path = save("a.jsonl", rows(both, both | {"response": "r"}))
    assert read_pairs(path)[0] == [Pair(prompt="Hi", response="Hallo"), Pair(prompt="p", response="r")]


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_bpe(["Hello there"], 270, append_eos=False)
    made.bos_token = "</s>"
    return made


def test_messages_through_a_chat_template(save, tokenizer: PreTrainedTokenizerFast, monkeypatch) -> None:
    path = save("a.jsonl", rows(chat("user: Hi", "assistant: Hallo")))
    assert read_pairs(path, tokenizer=tokenizer)[0][0].prompt == "Hi"  # it has none
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert read_pairs(path, tokenizer=tokenizer)[0][0].prompt == "</s><user>Hi<assistant>"
    path = save("b.jsonl", rows(chat("user: Hi", "assistant: Hallo"), chat("tool: 5", "assistant: Hallo")))
    with pytest.raises(DataError, match=r"b\.jsonl:2: .*chat template refuses these messages \(no tools\)"):
        read_pairs(path, tokenizer=tokenizer)


def test_the_start_token_is_not_doubled(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template writes the start token and many tokenizers add it again: one of the two has to go."""

    class AddsStart:
        chat_template, bos_token, bos_token_id = TEMPLATE, "</s>", 1

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, *tokenizer(text)["input_ids"]]}

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, **options)

    adds = AddsStart()
    text = render([{"role": "user", "content": "Hi"}], adds)
    assert text == "<user>Hi<assistant>"
    assert adds(text)["input_ids"] == tokenizer("</s><user>Hi<assistant>")["input_ids"]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts(save) -> None:
    assert read_prompts(save("a.jsonl", rows({"prompt": "a"}, {"prompt": "a", "response": 5}))) == ["a", "a"]
    assert read_prompts(save("a.txt", "\ufeff{a\r\n b\tc \nd")) == ["{a", " b\tc ", "d"]
    assert read_prompts(save("a.txt", "a\nb\n\n \n")) == ["a", "b"]
    assert read_prompts(save("a.data", '{"prompt": "a"}')) == ["a"]
    assert read_prompts(save("a.tsv", "a\tb\nc\td\n")) == ["a", "c"]
    with_and_without_answer = rows(chat("user: Hi", "assistant: Hallo"), chat("user: Hi"))
    assert read_prompts(save("a.jsonl", with_and_without_answer)) == ["Hi", "Hi"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a\n\n\nb\n", "a.txt:2: the prompt is empty"),
        ("a.txt", "\na\n", "a.txt:1: the prompt is empty"),
        ("a.txt", "a\n\udce4\n", "a.txt:2: not UTF-8"),
        ("a.txt", "", "a.txt:1: the file is empty"),
        (
            "a.jsonl",
            rows({"prompt": "a"}, {"prmpt": "a"}),
            "a.jsonl:2: no 'prompt', but 'prmpt': did you mean 'prompt'?",
        ),
        ("a.jsonl", rows({"prompt": "a"}, {"prompt": ""}), "a.jsonl:2: the prompt is empty"),
        ("a.jsonl", rows({"prompt": "a"}, {"messages": []}), "a.jsonl:2: the prompt is empty"),
        ("a.jsonl", rows({"prompt": None}), "a.jsonl:1: 'prompt' must be text, is null"),
    ],
)
def test_faulty_prompts(save, name: str, content: str, expected: str) -> None:
    path = save(name, content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path.parent}{os.sep}{expected}")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch) -> Iterator[None]:
    """Every flush to the disk finds it full."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", fail)
        yield


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as file:
        file.write("ä\n")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"\xc3\xa4\n"
    with atomic_write(path, binary=True) as file:
        file.write(b"\0")
        assert path.read_bytes() == b"\xc3\xa4\n"
    assert path.read_bytes() == b"\0"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failed_write_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write("new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with (
        pytest.raises(StorageError, match=r"a\.txt \(No space left.*\): free some space.*before is unchanged"),
        atomic_write(path) as file,
    ):
        file.write("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="needs links without special rights")
def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "link").symlink_to("a.txt")
    with atomic_write(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/null")
def test_devices_are_written_not_replaced() -> None:
    with atomic_write("/dev/null") as file:
        file.write("new")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "x"), "free some space"),
        (OSError(errno.EDQUOT, "x"), "free some space"),
        (OSError(errno.EROFS, "x"), "choose a place that can be written to"),
        (PermissionError(errno.EACCES, "x"), "choose a place that can be written to"),
        # As the libraries say it on a disk that is full.
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "free some space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "free some space"),
    ],
)
def test_advice(error: Exception, advice: str) -> None:
    match = f"cannot write a .*: {advice}.*; all is kept"
    with pytest.raises(StorageError, match=match) as caught, storage.storage_errors("a", "all is kept"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "x"), StorageError("x")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, storage.storage_errors("a"):
        raise error
    assert caught.value is error


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def fill(folder: Path, text: str) -> None:
    (folder / "slm").mkdir()
    (folder / "slm" / f"{text}.json").write_text(text)
    (folder / "config.json").write_text(text)


def test_atomic_folder(tmp_path: Path) -> None:
    """A new folder appears at once; in an old one entries are replaced, subfolders as a whole, and others stay."""
    path = tmp_path / "models" / "m"
    with atomic_folder(path) as new:
        fill(new, "one")
        assert not path.exists()
    assert tree(path) == {"config.json": "one", "slm/one.json": "one"}
    (path / "run").mkdir()
    (path / "run" / "checkpoint").write_text("mine")
    (path / "README.md").write_text("mine")
    before = path.stat().st_ino
    with atomic_folder(path) as new:
        fill(new, "two")
        assert tree(path)["config.json"] == "one"
    assert tree(path) == {"README.md": "mine", "config.json": "two", "run/checkpoint": "mine", "slm/two.json": "two"}
    assert path.stat().st_ino == before
    assert list(path.parent.iterdir()) == [path]


def test_atomic_folder_where_we_are(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("mine")
    with atomic_folder(".") as new:
        fill(new, "one")
    assert tree(Path()) == {"config.json": "one", "data.txt": "mine", "slm/one.json": "one"}


@pytest.mark.parametrize("there", [False, True])
def test_a_failed_folder_changes_nothing(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "m"
    if there:
        path.mkdir()
        fill(path, "old")
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as new:
        fill(new, "new")
        raise KeyboardInterrupt
    assert tree(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"] * there


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch) -> None:
    """Also when the library that writes has its own error for it."""
    path = tmp_path / "m"
    path.mkdir()
    fill(path, "old")

    def no_room(*_: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", no_room)
    with pytest.raises(StorageError, match="before is unchanged"), atomic_folder(path) as new:
        fill(new, "new")
        safetensors.torch.save_file({"a": torch.zeros(1)}, new / "model.safetensors")
    assert tree(path) == {"config.json": "old", "slm/old.json": "old"}


def test_a_kill_while_filling_leaves_the_old_folder(tmp_path: Path) -> None:
    """What a kill leaves behind is neither read nor mixed into the next folder."""
    path = tmp_path / "m"
    path.mkdir()
    fill(path, "old")
    (path / PARTIAL).mkdir()
    fill(path / PARTIAL, "cut")
    settle(path)
    assert tree(path)["config.json"] == "old"
    with atomic_folder(path) as new:
        assert list(new.iterdir()) == []
        (new / "config.json").write_text("new")
    assert tree(path) == {"config.json": "new", "slm/old.json": "old"}


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_while_moving_is_made_good(tmp_path: Path, monkeypatch, moved: int) -> None:
    """The new content was complete: `settle` brings the rest of it."""
    path = tmp_path / "m"
    path.mkdir()
    fill(path, "old")
    (path / "new.txt").mkdir()  # a folder where a file comes
    replace, moves = Path.replace, []

    def replace_until_killed(self: Path, target: Path) -> Path:
        if self.parent.name == READY:
            moves.append(self.name)
            if len(moves) > moved:
                raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_until_killed)
        with pytest.raises(KeyboardInterrupt), atomic_folder(path) as new:
            fill(new, "new")
            (new / "new.txt").write_text("new")
    settle(path)
    assert tree(path) == {"config.json": "new", "new.txt": "new", "slm/new.json": "new"}
    assert not (path / READY).exists()


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    """Found before the work of filling is done."""
    path = tmp_path / "m"
    path.write_text("mine")
    with pytest.raises(StorageError, match="choose another name"), atomic_folder(path):
        raise AssertionError
    assert tree(tmp_path) == {"m": "mine"}


# --- lines -----------------------------------------------------------------------------------------------------------

LINES = [{"prompt": "ä\u2028\n", "n": 1}, {"prompt": "b", "n": None}, {"prompt": "c"}]


def test_appended_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    assert completed_lines(path) == []
    with append_jsonl(path) as file:
        file.write(LINES[0])
        assert completed_lines(path) == LINES[:1]  # at once, not at the end
        file.write(*LINES[1:])
        file.write()
    assert completed_lines(path) == LINES
    assert path.read_bytes().startswith(b'{"prompt": "\xc3\xa4\xe2\x80\xa8\\n", "n": 1}\n')


def test_a_cut_off_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with append_jsonl(path) as file:
        file.write(*LINES)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        done = sum(end <= size for end in ends)
        assert completed_lines(path) == LINES[:done]
        with append_jsonl(path) as file:
            file.write(*LINES[done:])
        assert path.read_bytes() == whole


def test_a_long_cut_off_line(tmp_path: Path) -> None:
    """Longer than what is looked at in one go."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + b"x" * 200_000)
    append_jsonl(path).close()
    assert path.read_bytes() == b"{}\n"
    path.write_bytes(b"x" * 200_000)
    append_jsonl(path).close()
    assert path.read_bytes() == b""


def test_faulty_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n\n{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        completed_lines(path)
    path.write_bytes(b"{}\n\xe4\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not UTF-8"):
        completed_lines(path)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """Part of a line gets out before the disk is full: it is taken back, and once there is room writing goes on."""
    path = tmp_path / "a.jsonl"
    with append_jsonl(path) as file:
        file.write(LINES[0])
        real = file._file

        class Full:
            """Takes five bytes, then no more."""

            taken = 0

            def write(self, data: memoryview) -> int | None:
                if self.taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.taken = real.write(data[:5])
                return self.taken

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

        file._file = Full()
        with pytest.raises(StorageError, match=r"a\.jsonl \(No space left.*the finished lines are kept"):
            file.write(*LINES[1:])
        assert path.read_bytes().count(b"\n") == 1
        assert completed_lines(path) == LINES[:1]
        file._file = real
        file.write(*LINES[1:])
    assert completed_lines(path) == LINES
