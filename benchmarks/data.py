"""Measures the way from texts and token files to batches: seconds, and the memory it takes.

python benchmarks/data.py                 everything, about two minutes
python benchmarks/data.py --tokens 2e9    with a file of so many ids (4 GB)

tokenise   WordNet by 1, 2, ... processes; the files must be the same
scan       the first opening of a raw uint16 file: ids checked, documents found
open       every later one
batches    rows of 4,097 ids from all over that file
"""

import argparse
import hashlib
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from rorqual.data import tokenizer
from rorqual.data.corpus import open_corpus
from rorqual.data.stream import Stream
from rorqual.data.token_files import open_token_files
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokens import tokenise

PIECE = 1 << 24


def digest(folder: Path) -> str:
    whole = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tokenising(words: Tokenizer, folder: Path, processes: list[int]) -> None:
    corpus = open_corpus("wordnet")
    began = time.perf_counter()
    texts = sum(1 for _ in corpus.documents())
    print(f"before: peak {peak():,.0f} MB")
    print(f"reading and leaving out copies: {time.perf_counter() - began:.1f} s, {texts:,} texts")
    for count in processes:
        began = time.perf_counter()
        # The corpus knows its copies from the pass before.
        made = tokenise(corpus, words, folder / str(count), processes=count)
        seconds = time.perf_counter() - began
        print(f"tokenise, {count} processes: {seconds:.1f} s, files {digest(made.path)}")


def write_ids(path: Path, count: int, vocab_size: int, end: int) -> None:
    draw = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, count, PIECE):
            ids = draw.integers(1, vocab_size, min(PIECE, count - start), dtype=np.uint16)
            ids[draw.random(len(ids), dtype=np.float32) < 1 / 500] = end
            file.write(ids.tobytes())


def token_files(words: Tokenizer, folder: Path, count: int) -> None:
    path = folder / "ids.bin"
    write_ids(path, count, words.vocab_size, words.end_id)
    for what in ("scan", "open"):
        began = time.perf_counter()
        made = open_token_files(str(path), words, folder / "cache", name="words")
        seconds = time.perf_counter() - began
        rate = path.stat().st_size / 1e6 / seconds
        print(
            f"{what}: {seconds:.3f} s, {rate:,.0f} MB/s, {made.train.documents:,} documents, "
            f"peak {peak():,.0f} MB"
        )
    stream = Stream(made.train, 8, 4096, seed=0)
    next(stream)
    began = time.perf_counter()
    for _ in range(50):
        next(stream)
    seconds = (time.perf_counter() - began) / 50
    print(f"batches: {8 * 4096 / seconds / 1e6:.1f} M ids/s, peak {peak():,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=float, default=2e8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    words = tokenizer.train(open_corpus("wordnet", limit=5000).documents(), 4096)
    with tempfile.TemporaryDirectory() as name:
        tokenising(words, Path(name), options.processes)
        token_files(words, Path(name), int(options.tokens))


if __name__ == "__main__":
    main()
