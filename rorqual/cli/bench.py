"""Implements `rorqual bench`: measures servers."""

import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.cli.parse import Positional, UsageError, emit, parse_new, split_first, take
from rorqual.hints import choose
from rorqual.io import write_json

EXAMPLE = "rorqual bench serve runs/demo/engram"
USUAL_URL = "http://127.0.0.1:8000"
NAMES = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "e2el": "end to end",
    "wait": "waited for --concurrency",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """Measures a server of OpenAI's protocol: throughput, latencies, goodput, failures.

    With a run it starts `rorqual serve` for it on a free port, and ends it afterwards; with --url
    it measures a server that runs, also one of vLLM or transformers. Ctrl-C prints what was
    measured. --json prints for machines, with the keys of vLLM's result files.

    rorqual bench serve runs/demo/engram --requests 32 --concurrency 8
    rorqual bench serve runs/demo/engram --rate 4 --goodput ttft:200 itl:50
    """

    # a run folder, a pretrained name, a DeepSeek folder or a hub id; none: --url
    run: Positional[str] = ""
    url: str | None = None  # of a server that runs; none: http://127.0.0.1:8000
    model: str | None = None  # none: the first that the server lists
    # none: for a server on this machine RORQUAL_API_KEY of the environment, or no login
    api_key: str | None = None
    requests: int = 64
    rate: float = math.inf  # requests a second, at random times; inf: all at once
    concurrency: int | None = 8  # requests at once at most; the others wait; none: no limit
    input_tokens: int = 128  # ids of each prompt, drawn at random
    shared_tokens: int = 0  # the first of them that are the same in all prompts
    output_tokens: int = 64  # at most, and exactly with --ignore-eos
    prompts: str | None = None  # a file instead: a text a line, or .jsonl with prompt or messages
    ignore_eos: bool = True  # ask for all tokens; some servers refuse the field: false
    temperature: float = 0.0
    seed: int = 0  # of prompts and times
    goodput: tuple[
        str, ...
    ] = ()  # limits of a good request in ms: ttft:200 tpot:50 itl:80 e2el:9e3
    timeout: float = 600.0  # seconds of a request
    out: str | None = None  # a file for the figures, as JSON
    serve: tuple[str, ...] = ()  # options of the server that is started: context=512 dtype=bfloat16


def bench_command(argv: list[str]) -> int:
    """Measures a server; returns the exit code."""
    as_json, argv = take("--json", argv)
    verb, rest = split_first(argv, "serve", EXAMPLE)
    if verb in ("-h", "--help"):
        verb = "serve"
        rest = ["--help"]
    try:
        choose("verb of bench", verb, ("serve",))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return bench_serve(parse_new(Serve, rest, "bench serve"), as_json)


def bench_serve(options: Serve, as_json: bool) -> int:
    """Measures and prints; the exit code is 1 where no request ended whole."""
    if options.run and options.url is not None:
        raise UsageError(f"got {options.run!r} and --url, expected one: a run to serve or a server")
    for name in ("requests", "concurrency", "output_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"got --{name.replace('_', '-')} {value}, expected at least 1")
    for name in ("rate", "timeout"):
        if not getattr(options, name) > 0:
            raise UsageError(f"got --{name} {getattr(options, name)}, expected more than 0")
    from rorqual.serve import bench

    limits = bench.limits_of(options.goodput) if options.goodput else None
    served: Any = nullcontext(options.url or USUAL_URL)
    if options.run:
        started = [f"--max-batch-size={options.concurrency or 8}", *_flags(options.serve)]
        served = bench.running(options.run, started)
    prompts = _prompts(options)
    with served as running:
        url = running.url if options.run else running
        server = bench.Server(url, model=options.model, api_key=_api_key(options, url))
        load = bench.Load(
            prompts=prompts(server.vocab_size),
            output_tokens=options.output_tokens,
            rate=options.rate,
            concurrency=options.concurrency,
            seed=options.seed,
            timeout=options.timeout,
            options={"temperature": options.temperature}
            | ({"ignore_eos": True} if options.ignore_eos else {}),
        )
        outcomes, seconds = bench.measure(server, load, _progress(len(load.prompts)))
    figures = bench.summarise(outcomes, seconds, limits)
    described = {"url": server.url, "model_id": server.model, "num_prompts": len(load.prompts)}
    # JSON has no infinity.
    rate = "inf" if options.rate == math.inf else options.rate
    described |= {"request_rate": rate, "max_concurrency": options.concurrency}
    examples = {each.failure: each.message for each in reversed(outcomes) if each.failure}
    if options.out is not None:
        write_json(Path(options.out), described | figures)
    if as_json:
        emit(described | figures)
    else:
        _show(described, figures, limits, examples)
    if len(outcomes) < len(load.prompts) or figures["unfinished"]:
        return 130
    return 0 if figures["completed"] else 1


def _flags(words: tuple[str, ...]) -> list[str]:
    """Returns options such as context=512 with the two dashes that `rorqual serve` expects."""
    return [word if word.startswith("-") else f"--{word}" for word in words]


def _api_key(options: Serve, url: str) -> str | None:
    """Returns the key for a server; that of the environment goes to no other machine."""
    from rorqual.serve import bench

    if options.api_key is not None or not bench.is_local(url):
        return options.api_key
    return os.environ.get("RORQUAL_API_KEY")


def _prompts(options: Serve) -> Callable[[int | None], list[dict[str, Any]]]:
    """Returns what makes the prompts for a vocabulary size; bad options raise ValueError before."""
    from rorqual.serve import bench

    if options.prompts is not None:
        texts = bench.read_prompts(Path(options.prompts))
        return lambda vocab_size: [texts[i % len(texts)] for i in range(options.requests)]
    bench.check_lengths(options.input_tokens, options.shared_tokens)

    def draw(vocab_size: int | None) -> list[dict[str, Any]]:
        return bench.random_prompts(
            options.requests,
            options.input_tokens,
            vocab_size,
            shared=options.shared_tokens,
            seed=options.seed,
        )

    return draw


def _progress(total: int) -> Any:
    """Returns what prints the number of requests done; only on a terminal does it print."""

    def show(done: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{total} requests", end=end, file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda done: None


def _show(
    described: dict[str, Any],
    figures: dict[str, Any],
    limits: dict[str, float] | None,
    examples: dict[str, str],
) -> None:
    """Prints the figures as a table; `examples` has a message for each kind of failure."""
    print(
        f"{described['url']}  model {described['model_id']}  rate {described['request_rate']}  "
        f"concurrency {described['max_concurrency'] or 'without limit'}"
    )
    ended = figures["completed"] + figures["failed"] + figures["unfinished"]
    print(
        f"{figures['completed']} of {described['num_prompts']} requests whole, "
        f"{figures['failed']} failed, in {figures['duration']:.2f} s"
    )
    if figures["unfinished"] or ended < described["num_prompts"]:
        never = described["num_prompts"] - ended
        print(f"stopped: {figures['unfinished']} were running, {never} were not sent")
    for failure, count in figures["failures"].items():
        print(f"  {count} x {failure}: {examples.get(failure) or 'no message'}")
    if figures["failed_output_tokens"]:
        print(f"  {figures['failed_output_tokens']} tokens of requests that are not whole")
    if figures["counted_by_pieces"]:
        print("the server sends no usage: tokens are counted as pieces of text, prompts not at all")
    print(
        f"{figures['request_throughput']:.2f} requests/s, "
        f"{figures['output_throughput']:.1f} output tokens/s, "
        f"{figures['total_token_throughput']:.1f} tokens/s with prompts "
        f"({figures['total_input_tokens']} in, {figures['total_output_tokens']} out)"
    )
    columns = ("mean", "p50", "p90", "p99", "max")
    print(f"{'ms':26}" + "".join(f"{column:>10}" for column in columns))
    for key, name in NAMES.items():
        values = [figures[f"{column}_{key}_ms"] for column in columns]
        if values[0] is None or (key == "wait" and described["request_rate"] == "inf"):
            continue
        print(f"{name:26}" + "".join(f"{value:10.1f}" for value in values))
    if limits is not None:
        share = figures["good"] / max(figures["completed"] + figures["failed"], 1)
        within = ", ".join(f"{name} {limit:g} ms" for name, limit in limits.items())
        print(f"goodput {figures['request_goodput']:.2f} requests/s ({share:.0%}) within {within}")
