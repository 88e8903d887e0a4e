"""Times a block with several streams against the plain residual block, eager and compiled.

    python benchmarks/hyper.py --dim 512 --time 2048
    python benchmarks/hyper.py --kinds mhc --no-eager --threads 1
    python benchmarks/hyper.py --dim 64 --time 1024 --kinds mhc "single pass" --no-compiled --json

A block is attention and a SwiGLU of 4 * dim, each after a norm; a step is forward and backward. All
variants take turns in every round, so that a busy machine slows them alike; the least and the
median over the rounds are printed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from rorqual.layers.attention import GQA, GQAConfig
from rorqual.layers.context import context
from rorqual.layers.feed_forward import SwiGLU
from rorqual.layers.hyper import Connection, HyperConfig, Residual, Streams, expand
from rorqual.layers.norm import RMSNorm
from rorqual.layers.rope import RopeConfig


class Block(nn.Module):
    """A block with two residual sites, around attention and SwiGLU.

    It has one plain stream if `config` is None.
    """

    def __init__(self, dim: int, tokens: int, config: HyperConfig | None):
        super().__init__()
        rope = RopeConfig()
        self.attention = GQA(GQAConfig(heads=dim // 32, kv_heads=dim // 32, head_dim=32), dim, rope)
        self.ffn = SwiGLU(dim, 4 * dim)
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(2))
        self.sites = nn.ModuleList(
            Residual() if config is None else Connection(config, dim, n) for n in range(2)
        )
        self.ctx = context(1, tokens, "cpu", rope=(rope, 32))

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        h, mapping = self.sites[0].read(Streams(streams))
        x = self.sites[0].write(self.attention(self.norms[0](h), self.ctx).out, mapping)
        h, mapping = self.sites[1].read(x)
        return self.sites[1].write(self.ffn(self.norms[1](h)), mapping).values


def step(block: Callable, streams: torch.Tensor) -> Callable[[], None]:
    """Returns one forward and backward pass, as in a training step."""

    def run() -> None:
        block(streams).square().mean().backward()
        streams.grad = None

    return run


KINDS = {
    "mhc": {},
    "mhc identity": {"mix": "identity"},
    "single pass": {"kind": "single_pass"},
    "hc": {"kind": "hc"},
}


def variants(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Returns one step per variant by name, warmed up (and so compiled)."""
    configs: dict[str, HyperConfig | None] = {"plain": None}
    configs |= {name: HyperConfig(streams=options.streams, **KINDS[name]) for name in options.kinds}
    steps = {}
    for name, config in configs.items():
        block = Block(options.dim, options.time, config)
        hidden = torch.randn(1, options.time, options.dim)
        streams = expand(hidden, config).values.contiguous().requires_grad_()
        if options.eager:
            steps[f"{name}, eager"] = step(block, streams)
        if options.compiled:
            steps[f"{name}, compiled"] = step(torch.compile(block), streams)
    for name, run in steps.items():
        started = time.perf_counter()
        run()
        print(
            f"{name}: ready after {time.perf_counter() - started:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        run()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=512, help="width, a multiple of 32")
    parser.add_argument("--time", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--kinds", nargs="*", choices=KINDS, default=["mhc"], help="beside the plain block"
    )
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps = variants(options)
    seconds = {}
    for _ in range(options.rounds):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    results = {}
    for name, times in seconds.items():
        plain = seconds[f"plain, {name.split(', ')[1]}"]
        results[name] = {
            "least": min(times),
            "median": statistics.median(times),
            "least_of_plain": min(times) / min(plain),
            "median_of_plain": statistics.median(times) / statistics.median(plain),
        }
    if options.json:
        print(json.dumps({"options": vars(options), "found": results}))
        return
    print(f"{'':24s} {'least ms':>10s} {'median ms':>10s}   times plain: least, median")
    for name, of in results.items():
        milliseconds = f"{1000 * of['least']:10.1f} {1000 * of['median']:10.1f}"
        print(
            f"{name:24s} {milliseconds}   {of['least_of_plain']:18.2f} {of['median_of_plain']:7.2f}"
        )


if __name__ == "__main__":
    main()
