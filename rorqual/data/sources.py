"""Finds a source by name and reads its raw texts, undecoded and uncleaned, with licence and size.

    wordnet                      WordNet 3.0, bundled with rorqual
    docstrings[:PACKAGE,...]     docstrings of the Python packages installed here; parsed, never
                                 imported
    gcide                        the Collaborative International Dictionary of English, from
                                 Debian's dict-gcide
    hf:NAME[:CONFIG[:SPLIT]]     a Hugging Face dataset, streamed
    a file or folder             .txt, .md, .jsonl, .parquet (.bin and .npy: `token_files`)

`corpus.open_corpus` makes documents of them. A reader yields (place, bytes) and calls `skip(reason,
place)` for all that it leaves out, so that everything left out is counted. Imports `files` beside
it.
"""

import ast
import bz2
import functools
import gzip
import importlib.metadata
import os
import re
import string
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.data import files
from rorqual.data.files import Raw, Skip
from rorqual.hints import install

WORDNET = Path(__file__).with_name("texts") / "wordnet-3.0.txt.bz2"
DICTD = Path("/usr/share/dictd")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")
_DIGITS = {
    c: i
    for i, c in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where texts come from.

    `bytes` is the size of what is read, None where it is unknown; `stamp` changes with the texts.
    """

    name: str
    license: str
    bytes: int | None
    read: Callable[[Skip], Raw]
    stamp: Callable[[], str]


def find(name: str, *, column: str = "text", longest: int = files.LONGEST) -> Source:
    """Returns the source of that name. Long files may come in pieces of `longest` bytes.

    ValueError, with a hint, for a source that does not exist.
    """
    kind, _, rest = name.partition(":")
    if name == "wordnet":
        return _wordnet()
    if name == "gcide":
        return _gcide(DICTD)
    if kind == "docstrings":
        return _docstrings([piece for piece in rest.split(",") if piece])
    if kind == "hf":
        return _hub(rest, column)
    if files.token_paths(Path(name)):
        raise ValueError(
            f"got data {name!r}, which holds token ids, expected a text: wordnet, a file, a folder"
        )
    if not os.path.exists(name):
        names = "wordnet, docstrings, gcide, hf:NAME, or a file or folder that exists"
        hint = (
            f"; for the hub's dataset of that name write hf:{name}"
            if _HUB_ID.fullmatch(name)
            else ""
        )
        raise ValueError(f"got data {name!r}, expected {names}{hint}")
    source = files.listed(Path(name))
    return Source(
        name=files.printable(Path(name)),
        license="unstated: local files",
        bytes=source.bytes,
        read=lambda skip: source.read(column, longest, skip),
        stamp=source.stamp,
    )


def _wordnet() -> Source:
    """Returns the bundled WordNet, one entry a line; it is decompressed as it is read."""

    def read(skip: Skip) -> Raw:
        with bz2.open(WORDNET) as file:
            for line in file:
                yield "wordnet", line

    return Source(
        name="WordNet 3.0",
        license="WordNet 3.0 licence, Princeton University 2006: free for any use, with its notice",
        bytes=11_494_709,
        read=read,
        stamp=lambda: files.digest([WORDNET], root=WORDNET.parent),
    )


def _docstrings(packages: list[str]) -> Source:
    """Returns the docstrings of installed packages, of all of them if none is named.

    ValueError for a package that is not installed.
    """
    distributions = {
        d.name: d
        for d in sorted(importlib.metadata.distributions(), key=lambda d: d.name or "")
        if d.name
    }
    unknown = sorted({name.lower() for name in packages} - {name.lower() for name in distributions})
    if unknown:
        raise ValueError(
            f"got docstrings of {', '.join(unknown)}, expected installed packages (see `pip list`)"
        )
    wanted = {name.lower() for name in packages} or {name.lower() for name in distributions}
    selected = [d for name, d in distributions.items() if name.lower() in wanted]
    listed = [
        file
        for d in selected
        for file in d.files or ()
        if file.suffix == ".py" and ".." not in file.parts
    ]
    paths = {str(file): Path(str(file.locate())) for file in listed}
    sizes = [path.stat().st_size for path in paths.values() if path.is_file()]
    versions = sorted(f"{d.name}=={d.version}" for d in selected)

    def read(skip: Skip) -> Raw:
        for name, path in paths.items():
            module = ".".join(Path(name).with_suffix("").parts).removesuffix(".__init__")
            for title, text in _documented(path, module, skip):
                yield name, f"{title}\n\n{text}".encode("utf-8", "surrogatepass")

    return Source(
        name=f"docstrings of {len(selected)} packages"
        if len(selected) != 1
        else f"docstrings of {versions[0]}",
        license="each package's own: " + _licenses(selected),
        bytes=sum(sizes),
        read=read,
        stamp=lambda: "\n".join(versions),
    )


def _licenses(selected: Iterable[importlib.metadata.Distribution]) -> str:
    """Summarises the licences of packages, such as "MIT (12), Apache-2.0 (7), ..."."""
    counts: Counter[str] = Counter()
    for distribution in selected:
        # Plain indexing by a field that is not there is deprecated.
        licenses = distribution.metadata.get_all
        kinds = [
            kind.split(" :: ")[-1]
            for kind in licenses("Classifier", [])
            if kind.startswith("License :: ")
        ]
        named = (
            licenses("License-Expression", [])
            or [" and ".join(kinds)] * bool(kinds)
            or licenses("License", [])
        )
        counts["".join(named[:1]).strip().partition("\n")[0][:40] or "unstated"] += 1
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(8)) + (
        ", ..." if len(counts) > 8 else ""
    )


def _documented(path: Path, module: str, skip: Skip) -> list[tuple[str, str]]:
    """Returns (qualified name, docstring) of a module and its definitions, in the file's order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in somebody's source
            tree = ast.parse(path.read_bytes())
    except OSError as error:
        skip(f"unreadable ({type(error).__name__})", files.printable(path))
        return []
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        skip("no Python that parses", files.printable(path))
        return []
    docstrings: list[tuple[str, str]] = []
    open_nodes: list[tuple[str, ast.AST]] = [(module, tree)]
    while open_nodes:
        name, node = open_nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
            if text := ast.get_docstring(node):
                docstrings.append((name, text))
        inside = [
            child
            for piece in ("body", "orelse", "handlers", "finalbody")
            for child in getattr(node, piece, ())
        ]
        open_nodes += [(name, child) for child in reversed(inside)]
    return docstrings


def _gcide(folder: Path) -> Source:
    """Returns Debian's GCIDE in this folder. ValueError where it is not installed."""
    index = folder / "gcide.index"
    packed = folder / "gcide.dict.dz"
    if not (index.is_file() and packed.is_file()):
        raise ValueError(
            "got data 'gcide', which is not installed here, "
            "expected `apt install dict-gcide` before"
        )
    return Source(
        name="Collaborative International Dictionary of English (Debian dict-gcide)",
        license="GPL-2.0-or-later",
        # The last four bytes of a gzip file are the length of its content.
        bytes=struct.unpack("<I", packed.read_bytes()[-4:].rjust(4, b"\0"))[0],
        read=lambda skip: _entries(index, packed, skip),
        stamp=lambda: files.digest([index, packed], root=folder),
    )


def _entries(index: Path, packed: Path, skip: Skip) -> Raw:
    """Yields each entry of a dictd dictionary once, however many headwords refer to it."""
    try:
        with gzip.open(packed) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{packed}: {error}, expected a dictzip file (apt reinstall dict-gcide)"
        ) from error
    places: dict[tuple[int, int], str] = {}
    for number, line in enumerate(index.read_bytes().split(b"\n"), 1):
        if not line or line.startswith(b"00"):  # the dictionary's notes on itself
            continue
        try:
            word, offset, length = line.decode("utf-8").split("\t")
            places.setdefault((_number(offset), _number(length)), word)
        except (ValueError, KeyError):
            skip("broken line of the index", f"{index} line {number}")
    for (start, size), word in sorted(places.items()):
        yield word, _entry(content[start : start + size])


def _number(digits: str) -> int:
    """Decodes dictd's base 64, most significant digit first."""
    return functools.reduce(lambda value, digit: value * 64 + _DIGITS[digit], digits, 0)


def _entry(text: bytes) -> bytes:
    """Puts each paragraph of an entry on one line, without braces and source marks.

    Source marks, such as [1913 Webster], are removed where they stand on lines of their own.
    """
    lines = [line.strip() for line in text.split(b"\n")]
    joined = b"\n".join(line for line in lines if not re.fullmatch(rb"\[[^\[\]]*\]( \S+)?", line))
    plain = re.sub(rb" {2,}", b" ", re.sub(rb"(?<!\n)\n(?!\n)", b" ", joined))
    return re.sub(rb"[{}]", b"", re.sub(rb"\s*\n\s*", b"\n", plain))


@dataclass(frozen=True, kw_only=True, slots=True)
class HubDataset:
    """A dataset of the hub, or of a folder, and the split that is read."""

    builder: Any
    split: str

    def rows(self) -> Any:
        """Returns the rows from the beginning on: an IterableDataset with a state of its own."""
        return self.builder.as_streaming_dataset(split=self.split)


def hub_dataset(name: str, column: str) -> HubDataset:
    """Finds the dataset NAME[:CONFIG[:SPLIT]].

    ValueError, with a hint, where there is no such dataset, split or column.
    """
    try:
        import datasets  # optional: the [hub] extra
    except ImportError as error:
        raise ValueError(
            f"got data 'hf:{name}', which needs the library datasets: {install('hub')}"
        ) from error
    path, config, split = _hub_name(name)
    try:
        builder = datasets.load_dataset_builder(path, config or None)
        dataset = HubDataset(builder=builder, split=split)
        names = dataset.rows().column_names
    except Exception as error:  # whatever a hub, a network or a dataset's files may raise
        raise ValueError(f"hf:{name}: {files.hub_reason(error)}") from error
    if names is not None and column not in names:
        raise ValueError(
            f"hf:{name}: got column {column!r}, expected one of {', '.join(names)} (--column)"
        )
    return dataset


def _hub_name(name: str) -> tuple[str, str, str]:
    """Splits NAME[:CONFIG[:SPLIT]]; the split is `train` unless another is named."""
    path, config, split, *more = (
        [*name.split(":"), "", ""] if name.count(":") < 3 else name.split(":")
    )
    if not path or any(more):
        raise ValueError(
            f"got data 'hf:{name}', expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"
        )
    return path, config, split or "train"


def _hub(name: str, column: str) -> Source:
    """Returns a dataset of the hub as a source, streamed from its beginning at every pass."""
    dataset = hub_dataset(name, column)
    builder = dataset.builder
    path = _hub_name(name)[0]

    def read(skip: Skip) -> Raw:
        """Yields the texts; a ValueError names the record after which the connection broke off."""
        number = 0
        try:
            for number, row in enumerate(dataset.rows(), 1):
                yield from files.cell(row, column, f"row {number}", skip)
        except Exception as error:
            raise ValueError(
                f"hf:{name}: broke off after row {number}: {files.first_line(error)}"
            ) from error

    return Source(
        name=f"hf:{name}",
        license=builder.info.license or f"see the card of {path}",
        bytes=builder.info.dataset_size or builder.info.download_size,
        read=read,
        stamp=lambda: f"{path} {builder.config_id} {dataset.split} {builder.hash}",
    )
