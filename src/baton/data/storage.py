"""Files and folders that are complete or absent, and what to say when the disk is full."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from baton.data.formats import decode_line, json_row
from baton.errors import StorageError

UNCHANGED = "what was there before is unchanged"
PARTIAL = ".partial"  # new content of a folder while it is written
READY = ".ready"  # the same once complete: its entries only need to be moved

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
IN_THE_WAY = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST}


@contextlib.contextmanager
def storage_errors(path: str | Path, kept: str = UNCHANGED) -> Iterator[None]:
    """Turn a full or unwritable disk inside the block into a `StorageError`; other errors pass as they are.

    Args:
        path: what is being written; kept: what survives, for the message.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number in FULL:
            advice = "free some space, or choose another place, and run again"
        elif number in FORBIDDEN:
            advice = "choose a place that can be written to"
        elif number in IN_THE_WAY:
            advice = "choose another name"
        else:
            raise
        raise StorageError(f"cannot write {path} ({os.strerror(number)}): {advice}; {kept}") from error


def _errno(error: Exception) -> int:
    """The system's error number, also of libraries that wrap it; 0 when there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, from Rust
        return int(found[1])
    # torch.save on a full disk only says "[enforce fail at inline_container.cc:672] . unexpected pos".
    return errno.ENOSPC if "inline_container" in str(error) else 0


def cache_folder() -> Path:
    """Where things are kept that can be made again: `BATON_CACHE`, or `~/.cache/baton`."""
    return Path(os.environ.get("BATON_CACHE") or Path.home() / ".cache" / "baton")


@contextlib.contextmanager
def atomic_write(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write that takes the place of `path` at the end of the block; on an error `path` is as before.

    Text is UTF-8 with `\\n`. The new content is on the disk, not only in memory, before the old one goes. Folders on
    the way are made. A path that is no regular file, such as `/dev/stdout`, is written directly.

    Raises:
        StorageError: the disk is full or not writable.
    """
    path = Path(path).resolve()  # through a link: what it points to is replaced, not the link
    mode = {"mode": "wb"} if binary else {"mode": "w", "encoding": "utf-8", "newline": "\n"}
    with storage_errors(path):
        if path.exists() and not path.is_file():
            with path.open(**mode) as file:  # type: ignore[call-overload]
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
        try:
            with partial.open(**mode) as file:  # type: ignore[call-overload]
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill, whose entries take their place in `path` at the end of the block.

    A new `path` appears at once. In one that exists, each entry of the new content, a subfolder as a whole, replaces
    the old one of that name, and all others (checkpoints, a card, the user's own files) stay. The folder itself is
    never renamed: it may be the current one, a mount, or hold open files. On an error inside the block, a full disk
    say, `path` is as before; a kill while entries move is made good by `settle`. One writer at a time.

    Raises:
        StorageError: the disk is full or not writable.
    """
    path = Path(path)
    with storage_errors(path):
        if path.exists() and not path.is_dir():  # said before the work of filling a folder is done
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        settle(path)
        partial = path / PARTIAL if path.is_dir() else path.with_name(f".{path.name}{PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)  # left by a kill
        partial.mkdir(parents=True)
        try:
            yield partial
            for each in [*partial.rglob("*"), partial]:
                _sync(each)
            partial.replace(path / READY if path.is_dir() else path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        settle(path)
        _sync(path.parent)


def settle(path: str | Path) -> None:
    """Finish the last step of an `atomic_folder` that a kill cut short. Call it before reading such a folder."""
    path = Path(path)
    ready = path / READY
    if not ready.is_dir():
        return
    for entry in sorted(ready.iterdir()):
        target = path / entry.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        elif entry.is_dir():
            target.unlink(missing_ok=True)
        entry.replace(target)
    ready.rmdir()
    _sync(path)


def _sync(path: Path) -> None:
    """Have a file, or a folder's list of entries, written to the disk itself."""
    if path.is_dir():
        if os.name == "posix":
            # Not every file system can do this for a folder; the rename is then as safe as it makes it.
            with contextlib.suppress(OSError):
                _fsync(path, os.O_RDONLY)
    elif path.is_file():
        _fsync(path, os.O_RDWR)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class JsonlAppender:
    """Adds rows to a JSONL file so that whatever happens it holds whole lines, but for a cut-off last one.

    Opening drops such a line. See `append_jsonl`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
            self._end = _end_of_lines(self._file)
            self._file.truncate(self._end)
            self._file.seek(self._end)

    def write(self, *rows: Mapping[str, Any]) -> None:
        """Append rows, all or none, and hand them to the system: a kill of this process does not lose them.

        Raises:
            StorageError: the disk is full; lines written before are kept.
        """
        data = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8"))
        end = self._end + len(data)
        with storage_errors(self.path, "the finished lines are kept"):
            try:
                while data:
                    data = data[self._file.write(data) :]
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.truncate(self._end)
                    self._file.seek(self._end)
                raise
        self._end = end

    def close(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # a pipe, say
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def append_jsonl(path: str | Path) -> JsonlAppender:
    """Open a JSONL file, new or from an earlier run, to add rows after its last complete line.

    Raises:
        StorageError: the disk is full or not writable.
    """
    return JsonlAppender(path)


def completed_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows that earlier runs finished. A last line without a line break was cut off and is left out.

    Raises:
        DataError: a complete line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.endswith(b"\n"):
                where = f"{path}:{number}"
                rows.append(json_row(decode_line(raw, where), where))
    return rows


def _end_of_lines(file: IO[bytes]) -> int:
    """Bytes up to and including the last line break."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
