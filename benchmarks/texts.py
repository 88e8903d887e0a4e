"""Soaks the corpus reader with hostile files and counts how each ends.

A file is read, counted in `.skipped`, or refused with a ValueError; each is a corpus of its own.

    python benchmarks/texts.py --files 1000

Any other exception, and any file that gives neither text nor reason, is lost; none is expected.
"""

import argparse
import io
import itertools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet

from rorqual.data.corpus import open_corpus

LETTERS = "whale 鲸 κῆτος 🐋 Бухта\n"
JSONL = (
    '{"text": "sung"}',
    '{"text": 3}',
    '{"other": "x"}',
    "[1]",
    '{"text": "cut',
    "[" * 5000,
    "NaN",
    "",
    "{}",
)


def text(rng: random.Random, length: int = 400) -> bytes:
    return "".join(rng.choices(LETTERS, k=rng.randint(1, length))).encode()


def scratched(data: bytes, rng: random.Random) -> bytes:
    """Returns the data with some bytes overwritten, whole or cut at a random place."""
    result = bytearray(data[: rng.choice((len(data), rng.randrange(len(data)) + 1))])
    for index in rng.choices(range(len(result)), k=rng.randint(0, 4)):
        result[index] = rng.randrange(256)
    return bytes(result)


def table(rng: random.Random) -> bytes:
    values = rng.choice(([text(rng).decode()] * 3, [None, "sung"], [1, 2], [text(rng)], []))
    pyarrow.parquet.write_table(
        pyarrow.table({rng.choice(("text", "other")): values}), sink := io.BytesIO()
    )
    return sink.getvalue()


KINDS: dict[str, tuple[str, Callable[[random.Random], bytes]]] = {
    "good text": (".md", text),
    "random bytes": (".txt", lambda rng: rng.randbytes(rng.randint(1, 2000))),
    "cut UTF-8": (".txt", lambda rng: text(rng) + "鲸".encode()[: rng.randint(1, 2)]),
    "NULs": (".md", lambda rng: text(rng) + b"\0" * rng.randint(1, 9) + text(rng)),
    "giant line": (
        ".txt",
        lambda rng: rng.choice((b"x", b"x ", "鲸".encode())) * rng.randint(2**16, 2**19),
    ),
    "jsonl": (".jsonl", lambda rng: "\n".join(rng.choices(JSONL, k=rng.randint(1, 9))).encode()),
    "random jsonl": (".jsonl", lambda rng: rng.randbytes(rng.randint(1, 2000))),
    "parquet": (".parquet", table),
    "broken parquet": (".parquet", lambda rng: scratched(table(rng), rng)),
    "random parquet": (
        ".parquet",
        lambda rng: b"PAR1" + rng.randbytes(rng.randint(1, 2000)) + b"PAR1",
    ),
    "empty": (".txt", lambda rng: b"" if rng.random() < 0.5 else b" \n\r\n" * rng.randint(1, 9)),
}


def ending(path: Path) -> str:
    """Returns how reading the file ends: "read", "skipped", "refused", or "lost: why"."""
    try:
        corpus = open_corpus(str(path))
        read = sum(1 for document in corpus.documents() if document.strip())
    except ValueError as error:
        clear = path.name in str(error) or corpus.skipped
        return "refused" if clear and "expected" in str(error) else f"lost: unclear {error!r}"
    # Any other exception is what this benchmark searches for.
    except Exception as error:
        return f"lost: {error!r}"
    return "skipped" if corpus.skipped else "read" if read else "lost: neither text nor reason"


def soak(files: int) -> dict[str, Counter[str]]:
    """Counts how the files of each kind end."""
    rng = random.Random(0)
    item = {kind: Counter[str]() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for number, (kind, (suffix, make)) in zip(
            range(files), itertools.cycle(KINDS.items()), strict=False
        ):
            path = Path(folder) / f"{number}{suffix}"
            path.write_bytes(make(rng))
            item[kind][ending(path)] += 1
    return item


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    total = sum((outcome := soak(options.files)).values(), Counter())
    lost = {
        f"{kind}: {end}": n
        for kind, ends in outcome.items()
        for end, n in ends.items()
        if end.startswith("lost")
    }
    lines = [f"{'':16}{'read':>9}{'skipped':>9}{'refused':>9}"]
    for kind, ends in (*outcome.items(), ("all", total)):
        lines.append(f"{kind:16}{ends['read']:9}{ends['skipped']:9}{ends['refused']:9}")
    lines += [*(f"{n} x {why}" for why, n in lost.items()), f"{sum(lost.values())} lost"]
    result = {"files": total.total(), "lost": sum(lost.values()), "reasons": lost, "kinds": outcome}
    print(json.dumps(result) if options.json else "\n".join(lines))
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
