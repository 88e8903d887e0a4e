"""Reads the raw texts of a file or folder: .txt and .md whole, .jsonl and .parquet by record.

A reader yields (place, bytes) and calls `skip(reason, place)` for all that it leaves out, so that
everything left out is counted. A text longer than requested comes in pieces that end where a
paragraph, a line or a word does, and all but the first of them are of type `Rest`.
"""

import hashlib
import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.data import chats
from rorqual.hints import install

Skip = Callable[[str, str], None]
Raw = Iterator[tuple[str, bytes]]
Reader = Callable[[io.BufferedIOBase, str, str, int, Skip], Raw]

TOKEN_KINDS = (".bin", ".npy")  # of token ids, which `token_files` opens
LONGEST = 2**16  # bytes of one document
LONGEST_LINE = 2**26  # bytes of one JSON line; a longer one is left out
_MARKS = (b"\n\n", b"\n", "。".encode(), b" ")
_YES = ("1", "ON", "YES", "TRUE")  # of huggingface_hub's environment variables
_BLANK = re.compile(rb"\s|" + "。".encode())


class Rest(bytes):
    """A piece of the same text as the piece before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """The readable files of a folder, or one file; `left` lists all else as (reason, place)."""

    root: Path
    paths: tuple[Path, ...]
    left: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> int:
        """The bytes of all files together; one that is gone meanwhile counts nothing."""
        return sum(os.path.getsize(path) for path in self.paths if os.path.isfile(path))

    def stamp(self) -> str:
        """Returns a text that changes when a name, a content or the division into texts does."""
        return f"whole {digest(self.paths, root=self.root)}"

    def read(self, column: str, longest: int, skip: Skip) -> Raw:
        """Yields the texts of all files in order of name, and counts what the listing left out."""
        for reason, where in self.left:
            skip(reason, where)
        for path in self.paths:
            yield from _file(path, column, longest, skip)


def listed(path: Path) -> Listed:
    """Lists the readable files of a folder, or one file.

    ValueError for a file of a kind that no reader here reads, and for a folder without any.
    """
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            raise ValueError(
                f"{printable(path)}: got {path.suffix or 'no extension'}, expected {_KINDS}"
            )
        return Listed(root=path.parent, paths=(path,), left=())
    paths, left = _walk(path)
    if not paths:
        met = ", ".join(
            f"{count} {reason}" for reason, count in Counter(reason for reason, _ in left).items()
        )
        raise ValueError(
            f"{printable(path)}: got {met or 'an empty folder'}, expected {_KINDS} files in it"
        )
    return Listed(root=path, paths=tuple(paths), left=tuple(left))


def token_paths(path: Path) -> list[Path]:
    """Returns the files of token ids that a path names, or an empty list where it names none.

    Megatron's two files may be named by what they have in common. A folder with any text in it is a
    folder of texts.
    """
    # These are False for a name that is too long for any file.
    if os.path.isdir(path):
        inside = _walk(path, TOKEN_KINDS)[0]
        return inside if not _walk(path)[0] else []
    if not os.path.isfile(path):
        path = Path(f"{path}.bin")
    elif path.suffix == ".idx":
        path = path.with_suffix(".bin")
    return [path] if path.suffix in TOKEN_KINDS and os.path.isfile(path) else []


def _walk(
    folder: Path, kinds: Container[str] | None = None
) -> tuple[list[Path], list[tuple[str, str]]]:
    """Returns the files of these kinds below a folder in order of name, and all else with reasons.

    Without kinds, those of texts.
    """
    kinds = _READERS if kinds is None else kinds
    paths: list[Path] = []
    left: list[tuple[str, str]] = []

    def unreadable(error: OSError) -> None:
        """Notes a folder that cannot be listed."""
        left.append(("unreadable folder", printable(Path(error.filename))))

    for here, folders, names in os.walk(folder, onerror=unreadable):
        shut = {name for name in folders if name.startswith(".") or Path(here, name).is_symlink()}
        folders[:] = sorted(set(folders) - shut)
        left += [("hidden or linked folder", printable(Path(here, name))) for name in sorted(shut)]
        for path in (Path(here, name) for name in sorted(names)):
            if path.name.startswith("."):
                left.append(("hidden file", printable(path)))
            elif path.suffix.lower() in kinds:
                paths.append(path)
            else:
                left.append(
                    (f"{printable(Path(path.suffix or 'extensionless'))} file", printable(path))
                )
    return paths, left


def _file(path: Path, column: str, longest: int, skip: Skip) -> Raw:
    """Yields the texts of one file by the reader of its kind, or skips it with the reason."""
    where = printable(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            skip("no regular file", where)
        elif not status.st_size:
            skip("empty file", where)
        else:
            with open(path, "rb") as file:
                yield from _READERS[path.suffix.lower()](file, where, column, longest, skip)
    except OSError as error:
        skip(f"unreadable ({type(error).__name__})", where)


def cut(file: io.BufferedIOBase, where: str, longest: int, skip: Skip) -> Raw:
    """Cuts a text into pieces of at most `longest` bytes at a paragraph, else a line, else a word.

    A word longer than half a piece is no prose: it is left out, as one, however long it is.
    """
    for number, piece in enumerate(_cut(file, where, longest, skip)):
        yield where, Rest(piece) if number else piece


def _cut(file: io.BufferedIOBase, where: str, longest: int, skip: Skip) -> Iterator[bytes]:
    """Yields the pieces of `cut` without their place, reading `longest` bytes at a time."""
    rest = b""
    half = longest // 2
    lost = False
    while block := file.read(longest):
        if lost:
            block, lost = _behind(block)
        rest += block
        while len(rest) > longest:
            end = next((end for end in _ends(rest, half, longest) if end), 0)
            if end:
                yield rest[:end]
                rest = rest[end:]
            else:
                skip("word too long", f"{where}: over {half} bytes without white space")
                end = max(_ends(rest, 0, half))
                if end:
                    yield rest[:end]
                rest, lost = _behind(rest[end:])
    if rest:
        yield rest


def _behind(text: bytes) -> tuple[bytes, bool]:
    """Returns what follows the first word, and whether that word goes on beyond the text."""
    match = _BLANK.search(text)
    return (text[match.end() :], False) if match else (b"", True)


def _ends(text: bytes, first: int, last: int) -> list[int]:
    """Returns where the last paragraph, line, unspaced sentence and word end; 0 for none.

    Only ends between `first` and `last` count. A sentence of a script without blanks ends with its
    full stop.
    """
    places = (text.rfind(mark, first, last) + len(mark) for mark in _MARKS)
    return [end if end >= len(mark) else 0 for mark, end in zip(_MARKS, places, strict=True)]


def _text(file: io.BufferedIOBase, where: str, column: str, longest: int, skip: Skip) -> Raw:
    """Reads a .txt or .md file, which is one text."""
    return cut(file, where, longest, skip)


def _jsonl(file: io.BufferedIOBase, where: str, column: str, longest: int, skip: Skip) -> Raw:
    """Reads a .jsonl file, a text a line; a line of more than LONGEST_LINE bytes is left out."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        location = f"{where} line {number}"
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (more := file.readline(LONGEST_LINE)) and not more.endswith(b"\n"):
                pass
            skip("giant line", f"{location}: over {LONGEST_LINE} bytes")
        elif line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                skip("not UTF-8", location)
            except (ValueError, RecursionError):
                skip("not JSON", location)
            else:
                yield from cell(row, column, location, skip)


def _parquet(file: io.BufferedIOBase, where: str, column: str, longest: int, skip: Skip) -> Raw:
    """Reads a column of a parquet file, a text a record. ValueError where pyarrow is missing."""
    try:
        import pyarrow as arrow  # optional: it comes with the [hub] extra
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"{where}: a parquet file needs pyarrow: {install('hub')}") from error
    number = 0
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if column not in names:
            skip(f"no column {column!r}", f"{where}: has {', '.join(names[:9])}")
            return
        for batch in table.iter_batches(256, columns=[column]):
            for value in batch.column(column).to_pylist():
                number += 1
                yield from cell({column: value}, column, f"{where} row {number}", skip)
    except (arrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
        skip("broken parquet", f"{where} after row {number}: {first_line(error)}")


def cell(row: Any, column: str, where: str, skip: Skip) -> Raw:
    """Yields the text in a column of one record, a chat as its document; none that is left out."""
    if not isinstance(row, dict):
        skip("no JSON object", f"{where}: {type(row).__name__}")
    elif column not in row:
        has = ", ".join(list(row)[:9]) or "none"
        skip(f"no column {column!r}", f"{where}: has {has}")
    elif row[column] is None:
        skip("empty", where)
    elif column == chats.COLUMN:
        try:
            text = chats.document(chats.read(row[column]))
        except ValueError as error:
            skip(str(error), where)
        else:
            yield where, text.encode("utf-8", "surrogatepass")
    elif not isinstance(row[column], str):
        skip(f"column {column!r} is no text", f"{where}: {type(row[column]).__name__}")
    else:
        yield where, row[column].encode("utf-8", "surrogatepass")


def digest(paths: Iterable[Path], *, root: Path) -> str:
    """Hashes the names of files below `root` and their contents."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        content = hashlib.blake2b(digest_size=16)
        try:
            if os.path.isfile(path):  # a pipe would never end
                with open(path, "rb") as file:
                    while block := file.read(2**20):
                        content.update(block)
        except OSError:
            content.update(b"unreadable")
        total.update(os.fsencode(path.relative_to(root)) + b"\0" + content.digest())
    return total.hexdigest()


def printable(path: Path) -> str:
    """Returns a path as text; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")


def hub_reason(error: BaseException) -> str:
    """Describes in one line why the hub returned nothing, and the remedy if it is out of reach."""
    chain: list[BaseException] = [error]
    while (
        cause := chain[-1].__cause__ or chain[-1].__context__
    ) is not None and cause not in chain:
        chain.append(cause)
    names = {each.__name__ for one in chain for each in type(one).__mro__}
    if not names & {
        "ConnectionError",
        "NetworkError",
        "TimeoutException",
        "Timeout",
        "OfflineModeIsEnabled",
    }:
        return first_line(error)
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    offline = any(
        os.environ.get(name, "").upper() in _YES
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    why = "HF_HUB_OFFLINE forbids to ask it" if offline else "no connection"
    return (
        f"the hub {hub} cannot be reached ({why}) and it is not in the local cache: "
        "set HF_ENDPOINT to a mirror, or give a local path"
    )


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_READERS: dict[str, Reader] = {".txt": _text, ".md": _text, ".jsonl": _jsonl, ".parquet": _parquet}
_KINDS = ", ".join(_READERS)
