"""Soaks a server with clients that hang up, fuzzed bodies and overload, and compares its answers.

    python benchmarks/soak.py --seconds 300
    python benchmarks/soak.py --seconds 20 --bodies 500 --hang-ups 40 --json

It starts `rorqual serve` on 127.0.0.1 for a small model of its own (experts, Engram, a chat
template; 4 requests at once, 8 in the queue), and prints

    same         answers (greedy, seeded, chat, log-probabilities) that differ after all of it
    bodies       fuzzed bodies sent, and those that were answered with status 500 or not at all
    hang-ups     clients that left in the middle, and what is still cached 5 s after the last
    overload     what the server does in a closed loop with its batch full, and then an open loop
                 of twice as many requests a second (--times) at random times: whole, refused (429),
                 other failures, answers that are not those of the request alone; resident memory
                 at first, in the middle, at the end; pages that are free when it is over
    refusals     answers that need a key or another host, without them

The exit code is 1 where any of it is not as it should be.
"""

import argparse
import contextlib
import json
import math
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

from rorqual import checkpoint
from rorqual.data import chats
from rorqual.data.tokenizer import train
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.bench import Load, Server, measure, random_prompts, running, summarise

KEY = "soak"
BATCH = 4
QUEUE = 8
CONTEXT = 256
SERVER = [
    f"--max-batch-size={BATCH}",
    f"--max-waiting={QUEUE}",
    f"--context={CONTEXT}",
    f"--api-key={KEY}",
]
HEADERS = {"authorization": f"Bearer {KEY}"}
PROMPTS = 24  # different ones under overload
GROWTH = 1.25  # how much resident memory may grow while the server is overloaded
LATE_GROWTH = 1.05  # and in the second half of that time
BODY: dict[str, Any] = {
    "prompt": "A whale is",
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 1,
    "seed": 1,
    "stop": ["."],
    "logit_bias": {"5": 1.0},
    "logprobs": 2,
    "response_format": {"type": "json_object"},
    "stream": False,
    "stream_options": None,
}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "A"}],
    "max_tokens": 4,
    "logprobs": True,
    "top_logprobs": 1,
}
# What many fields take, and what few do.
USUAL = (0, 1, 2, 5, 0.25, 1.0, True, False, None, "A", ["A"], [1, 2])
WRONG = (
    None,
    True,
    -1,
    0,
    1e308,
    math.inf,
    2**70,
    "",
    "é\ud800",
    "x" * 5000,
    [],
    [[]],
    {},
    {"a": 1},
)


def save_model(folder: Path) -> None:
    tokenizer = train(["A whale lives in the sea. 🐋 é"] * 4, 280)
    tokenizer.settings["chat_template"] = chats.TEMPLATE
    config = ModelConfig(
        vocab_size=290,
        dim=64,
        layers=3,
        dense_width=64,
        engram=EngramConfig(layers=(1,), rows_per_head=(97, 97), heads=2, head_dim=8),
        moe=MoEConfig(routed=6, active=2, width=32, first_dense=1),
        init_std=0.1,
    )
    model = LanguageModel(config, torch.from_numpy(tokenizer.canonical_map()), seed=1)
    checkpoint.save_model(folder, model, tokenizer)


def answers(client: httpx.Client) -> list[Any]:
    """Returns answers that must not depend on what the server did before."""
    bodies = [
        {"prompt": "A whale", "max_tokens": 40, "temperature": 0, "logprobs": 3},
        {"prompt": ["A", "sea. A whale lives"], "max_tokens": 30, "seed": 7, "n": 2},
        {"prompt": list(range(1, 200)), "max_tokens": 20, "temperature": 0, "ignore_eos": True},
        {"prompt": list(range(1, 180)), "max_tokens": 20, "temperature": 0, "ignore_eos": True},
        {"messages": CHAT["messages"], "max_tokens": 20, "seed": 3, "logprobs": True},
    ]
    results = []
    for body in bodies:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        results.append(answer.json()["choices"])
    return results


def fuzzed(draw: random.Random) -> tuple[str, bytes]:
    """Returns a path and a body in which fields or bytes are wrong."""
    chat = draw.random() < 0.5
    body = dict(CHAT if chat else BODY)
    for _ in range(draw.randint(1, 3)):
        name = draw.choice([*body, "min_tokens", "top_k", "min_p", "tools" if chat else "echo"])
        body[name] = draw.choice(USUAL if draw.random() < 0.8 else WRONG)
    raw = bytearray(json.dumps(body).encode())
    if draw.random() < 0.3:
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        raw = raw[: draw.choice((len(raw), draw.randrange(len(raw)) + 1))]
    return "/v1/chat/completions" if chat else "/v1/completions", bytes(raw)


def fuzz(client: httpx.Client, count: int, seed: int) -> dict[str, int]:
    draw = random.Random(seed)
    statuses = Counter[str]()
    for _ in range(count):
        path, body = fuzzed(draw)
        try:
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            statuses[str(answer.status_code)] += 1
        except httpx.TransportError as error:
            statuses[type(error).__name__] += 1
    return dict(statuses)


def hang_up(client: httpx.Client, seed: int) -> None:
    """Begins a request and closes the connection after some pieces, or before the first."""
    draw = random.Random(seed)
    body = {"prompt": [draw.randrange(1, 200) for _ in range(draw.randint(1, 150))]}
    body |= {"max_tokens": 100, "ignore_eos": True, "stream": True}
    pieces = draw.choice((0, 0, 1, 3, 10))
    with contextlib.suppress(httpx.ReadTimeout):
        limit = httpx.Timeout(30.0, read=0.05 * draw.random() + 1e-3 if not pieces else 30.0)
        with client.stream("POST", "/v1/completions", json=body, timeout=limit) as answer:
            for number, _ in enumerate(answer.iter_lines()):
                if number >= 2 * pieces:
                    return


def hang_ups(url: str, count: int, at_once: int = 8) -> dict[str, float]:
    def some(seeds: range) -> None:
        for seed in seeds:
            # A client of its own, so that its connection is closed.
            with httpx.Client(base_url=url, headers=HEADERS, trust_env=False) as client:
                hang_up(client, seed)

    threads = [
        threading.Thread(target=some, args=(range(first, count, at_once),))
        for first in range(at_once)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(5)
    return {"clients": count, **gauges(url)}


def gauges(url: str) -> dict[str, float]:
    text = httpx.get(url + "/metrics", headers=HEADERS, trust_env=False).text
    names = ("requests_running", "requests_waiting", "cached_tokens", "cache_pages")
    names += ("cache_capacity_pages", "cache_allocated_bytes")
    return {name: float(re.search(rf"^rorqual_{name} (\S+)", text, re.M)[1]) for name in names}


def resident(process: int) -> float:
    """Returns the resident memory of a process in MiB, NaN where the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return math.nan
    # A process that has ended has none.
    size = re.search(r"VmRSS:\s+(\d+)", status)
    return int(size[1]) / 1024 if size else math.nan


def overload(url: str, process: int, seconds: float, times: float) -> dict[str, Any]:
    """Offers `times` the requests that the server can do, and watches memory and answers."""
    server = Server(url, api_key=KEY)
    options = {"ignore_eos": True, "temperature": 0}
    prompts = random_prompts(PROMPTS, 32, server.vocab_size)

    def load(count: int, **limits: Any) -> Load:
        sent = [prompts[number % PROMPTS] for number in range(count)]
        return Load(prompts=sent, output_tokens=32, options=options, texts=True, **limits)

    # The answers of requests alone.
    outcomes, took = measure(server, load(PROMPTS, concurrency=1))
    alone = ["".join(one.texts or ()) for one in outcomes]
    # A closed loop that keeps the batch full, for a tenth of the time.
    count = max(4 * BATCH, int(0.1 * seconds * BATCH * PROMPTS / took / 2))
    done, took = measure(server, load(count, concurrency=2 * BATCH))
    capacity = summarise(done, took)["request_throughput"]
    memory = [resident(process)]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            memory.append(resident(process))

    watching = threading.Thread(target=watch)
    watching.start()
    rate = times * capacity
    try:
        outcomes, took = measure(server, load(max(int(rate * seconds), 1), rate=rate))
    finally:
        ended.set()
        watching.join()
    memory.append(resident(process))
    figures = summarise(outcomes, took)
    differ = sum(
        one.failure is None and "".join(one.texts or ()) != alone[number % PROMPTS]
        for number, one in enumerate(outcomes)
    )
    time.sleep(1)
    state = gauges(url)
    total = state["cache_capacity_pages"]
    middle = memory[len(memory) // 2]
    return {
        "requests a second in a closed loop": round(capacity, 2),
        "seconds": round(took, 1),
        "sent a second": round(len(outcomes) / took, 2),
        "sent": len(outcomes),
        "whole": figures["completed"],
        "refused (429)": figures["failures"].pop("429", 0),
        "other failures": figures["failures"],
        "answers unlike those alone": differ,
        "whole a second": round(figures["request_throughput"], 2),
        "sent over whole": round(len(outcomes) / max(figures["completed"], 1), 2),
        "p99 of the time to first token, ms": round(figures["p99_ttft_ms"] or math.nan, 1),
        "MiB at first, in the middle, at the end": [
            round(value, 1) for value in (memory[0], middle, memory[-1])
        ],
        "MiB at most": round(max(memory), 1),
        "pages free at the end": [total - state["cache_pages"], total],
        **state,
    }


def refusals(url: str) -> dict[str, int]:
    """Returns the statuses without a key, with a wrong one, and for the host of another machine."""
    body = {"prompt": "A", "max_tokens": 1}
    cases = {
        "no key": {},
        "wrong key": {"authorization": "Bearer soap"},
        "other host": HEADERS | {"host": "example.org"},
        "right": HEADERS,
    }
    return {
        name: httpx.post(
            url + "/v1/completions", json=body, headers=case, trust_env=False
        ).status_code
        for name, case in cases.items()
    }


def soak(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Returns what happened, and what of it should not have."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "whale"
        save_model(folder)
        with (
            running(str(folder), SERVER) as (url, process),
            httpx.Client(base_url=url, headers=HEADERS, timeout=60, trust_env=False) as client,
        ):
            before = answers(client)
            result: dict[str, Any] = {
                "bodies": fuzz(client, options.bodies, options.seed),
                "hang-ups": hang_ups(url, options.hang_ups),
                "overload": overload(url, process, options.seconds, options.times),
                "refusals": refusals(url),
            }
            after = answers(client)
            result["answers that differ"] = sum(a != b for a, b in zip(before, after, strict=True))
    loaded = result["overload"]
    left = result["hang-ups"]
    first, middle, end = loaded["MiB at first, in the middle, at the end"]
    wrong = {
        "a body was answered with 5xx or not at all": any(
            not status.startswith(("2", "4")) for status in result["bodies"]
        ),
        "tokens are still cached": bool(left["cached_tokens"] or loaded["cached_tokens"]),
        "pages are not free": bool(left["cache_pages"] or loaded["cache_pages"]),
        "requests are still there": bool(left["requests_running"] or left["requests_waiting"]),
        "nothing was refused": not loaded["refused (429)"],
        "a request failed otherwise": bool(loaded["other failures"]),
        "memory grows": loaded["MiB at most"] >= GROWTH * first or end >= LATE_GROWTH * middle,
        "answers under overload differ": bool(loaded["answers unlike those alone"]),
        "a check of key or host": list(result["refusals"].values()) != [401, 401, 400, 200],
        "answers differ": bool(result["answers that differ"]),
    }
    return result, [name for name, true in wrong.items() if true]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="of overload")
    parser.add_argument(
        "--times", type=float, default=2.0, help="the requests a second that the server can do"
    )
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--hang-ups", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    result, wrong = soak(options := parser.parse_args())
    if options.json:
        print(json.dumps(result | {"wrong": wrong}))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
        print("wrong:", ", ".join(wrong) or "nothing")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
