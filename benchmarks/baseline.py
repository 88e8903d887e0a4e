"""Runs the benchmarks that have a bar and collects their ratios in one table.

    python benchmarks/baseline.py                       all; takes long: leave the machine idle
    python benchmarks/baseline.py --against ../before   another checkout too, in turns: before, now
    python benchmarks/baseline.py --only rows decode_512 --json
    python benchmarks/baseline.py --smallest            tiny sizes: shows that everything runs

Every figure comes from a benchmark of this folder, run in a process of its own by the command that
docs/log.md names. A higher ratio is better, except for the mHC block, whose ratio is its time over
a plain block's. With --against the other checkout's own benchmark runs under its own rorqual; the
two take turns --rounds times, and medians are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parents[1]


class Bar(NamedTuple):
    """A figure: the benchmark that measures it, and the value that it must reach."""

    script: str
    words: str  # the arguments of the benchmark
    smallest: str  # the arguments of a run that takes seconds
    threads: int
    what: str
    least: float | None = None
    limit: float | None = None
    of_before: float | None = None  # at least this share of the other checkout's ratio


def backbone(name: str, what: str, **bar: float) -> Bar:
    """Returns a figure of backbone.py, over transformers."""
    words = f"--threads 2 --only {name}"
    return Bar("backbone", f"{words} --rounds 9", f"{words} --rounds 1", 2, what, **bar)


def sparse(kind: str, what: str) -> Bar:
    """Returns the speed of one kind over full attention, decoding at 32k tokens of context."""
    words = "--phases decode --threads 1 --kinds"
    full = "mla" if kind == "dsa" else "gqa"
    sizes = "--lengths 32768 --rounds 15"
    small = "--lengths 1024 --rounds 1"
    return Bar(
        "sparse",
        f"{words} {full} {kind} {sizes}",
        f"{words} {full} {kind} {small}",
        1,
        what,
        least=2.8,
    )


BARS = {
    "addresses": Bar(
        "engram",
        "--rounds 5",
        "--tokens 2000 --rows 97 --looked-up 64 --trained 2000 --touched 64 --rounds 1",
        2,
        "addresses over the numpy loop",
        least=10.0,
    ),
    "rows": Bar(
        "rows",
        "--rounds 15",
        "--rows 2000 --touched 64 --rounds 1",
        1,
        "row-sparse step over dense fused AdamW",
        least=6.0,
    ),
    "prefill_512": backbone("prefill_512", "prefill of 512 tokens over transformers", least=1.8),
    "prefill_2048": backbone("prefill_2048", "prefill of 2048 tokens over transformers", least=4.5),
    "decode_512": backbone(
        "decode_512", "decode behind 512 tokens over transformers", of_before=0.8
    ),
    "decode_2048": backbone(
        "decode_2048", "decode behind 2048 tokens over transformers", of_before=0.8
    ),
    "train": backbone("train_float32", "training step over transformers", least=1.3),
    "sparse_nsa": sparse("nsa", "NSA over full attention, decode at 32k"),
    "sparse_moba": sparse("moba", "MoBA over full attention, decode at 32k"),
    "sparse_dsa": sparse("dsa", "DSA over full MLA, decode at 32k"),
    "mhc": Bar(
        "hyper",
        "--kinds mhc --no-eager --threads 1 --rounds 9",
        "--kinds mhc --no-compiled --threads 1 --rounds 1 --dim 32 --time 16",
        1,
        "time of a block with mHC over a plain one",
        limit=1.25,
    ),
}


def figure(name: str, answer: dict[str, Any]) -> float:
    """Reads the ratio from a benchmark's JSON answer."""
    if name == "addresses":
        return answer["addresses_vs_numpy"]
    if name == "rows":
        return answer["sparse_step_vs_dense"]
    if name == "mhc":
        (ratio,) = [
            of["least_of_plain"] for kind, of in answer["found"].items() if kind.startswith("mhc")
        ]
        return ratio
    if name.startswith("sparse_"):
        kind = name.removeprefix("sparse_")
        (ratio,) = [row["times_full"] for row in answer["rows"] if row["kind"] == kind]
        return ratio
    return answer["train_float32" if name == "train" else name]


def measured(name: str, checkout: Path, *, smallest: bool) -> float | str:
    """Returns the ratio that a checkout reaches, or the error of a benchmark that fails."""
    bar = BARS[name]
    command = [sys.executable, str(checkout / "benchmarks" / f"{bar.script}.py"), "--json"]
    command += (bar.smallest if smallest else bar.words).split()
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(bar.threads)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return figure(name, json.loads(done.stdout.strip().splitlines()[-1]))


def compared(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns one line of the table: medians over the rounds, in which the checkouts take turns."""
    bar = BARS[name]
    places = {"now": HERE} | (
        {"before": Path(options.against).resolve()} if options.against else {}
    )
    item: dict[str, list[float]] = {position: [] for position in places}
    for _ in range(options.rounds):
        for position, checkout in reversed(places.items()):
            ratio = measured(name, checkout, smallest=options.smallest)
            if isinstance(ratio, str):
                return {
                    "name": name,
                    "what": bar.what,
                    "threads": bar.threads,
                    "failed": f"{position}: {ratio}",
                }
            item[position].append(ratio)
    line: dict[str, Any] = {
        "name": name,
        "what": bar.what,
        "threads": bar.threads,
        "bar": wanted(bar),
    }
    line |= {position: statistics.median(ratios) for position, ratios in item.items()}
    verdict = None if options.smallest else holds(bar, line["now"], line.get("before"))
    return line | {"holds": verdict}


def wanted(bar: Bar) -> str:
    if bar.of_before is not None:
        return f">= {bar.of_before:g} of before"
    return f">= {bar.least:g}" if bar.least is not None else f"<= {bar.limit:g}"


def holds(bar: Bar, now: float, before: float | None) -> bool | None:
    """Returns whether a figure reaches its bar, or None where that is unknown.

    A bar that is a share of another checkout's ratio needs that ratio.
    """
    if bar.of_before is not None:
        return None if before is None else now >= bar.of_before * before
    return now >= bar.least if bar.least is not None else bar.limit is not None and now <= bar.limit


def markdown(lines: list[dict[str, Any]]) -> str:
    rows = [
        "| figure | threads | before | now | now / before | bar | holds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        if "failed" in line:
            rows.append(f"| {line['what']} | {line['threads']} | | failed | | | {line['failed']} |")
            continue
        before = line.get("before")
        share = "" if before is None else f"{line['now'] / before:.2f}"
        shown = "" if before is None else f"{before:.2f}"
        verdict = {True: "yes", False: "**no**", None: "not known"}[line["holds"]]
        numbers = f"{line['threads']} | {shown} | {line['now']:.2f} | {share}"
        rows.append(f"| {line['what']} | {numbers} | {line['bar']} | {verdict} |")
    return "\n".join(rows)


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--against", metavar="FOLDER", help="another checkout of the repository")
    parser.add_argument("--only", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of each benchmark in each checkout"
    )
    parser.add_argument(
        "--smallest", action="store_true", help="sizes at which the ratios mean nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    lines = []
    for name in options.only:
        lines.append(compared(name, options))
        print(
            f"{name}: {lines[-1].get('now', lines[-1].get('failed'))}", file=sys.stderr, flush=True
        )
    print(json.dumps({"lines": lines}) if options.json else markdown(lines))
    if any("failed" in line for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
