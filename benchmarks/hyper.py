"""A block with many streams and the plain residual block -> how much the streams cost, eager and compiled.

    python benchmarks/hyper.py --dim 512 --time 2048
    python benchmarks/hyper.py --dim 64 --time 1024 --streams 4 --eager --json

A block is attention and a SwiGLU of 4 * dim behind a norm each; a step is forward and backward. All variants take turns
in every round, so that a busy machine slows them alike; what is printed is the median over the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from rorqual.layers.attention import GQA, GQAConfig
from rorqual.layers.basics import RMSNorm, RopeConfig, SwiGLU, layout, rope_tables
from rorqual.layers.hyper import Connection, HyperConfig, Residual, enter


class Block(nn.Module):
    """Two sites around attention and SwiGLU; one plain stream when `config` is None."""

    def __init__(self, dim: int, tokens: int, config: HyperConfig | None):
        super().__init__()
        rope = RopeConfig()
        self.attention = GQA(GQAConfig(heads=dim // 32, kv_heads=dim // 32, head_dim=32), dim, rope)
        self.ffn = SwiGLU(dim, 4 * dim)
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(2))
        self.sites = nn.ModuleList(Residual() if config is None else Connection(config, dim, n) for n in range(2))
        self.where = layout(1, tokens, "cpu")
        self.tables = rope_tables(rope, 32, self.where.positions)

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        streams, carried = self.sites[0](
            streams, lambda u: self.attention(self.norms[0](u), self.where, *self.tables), None
        )
        return self.sites[1](streams, lambda u: self.ffn(self.norms[1](u)), carried)[0]


def step(block: Callable, streams: torch.Tensor) -> Callable[[], None]:
    """One forward and backward as a training step does them."""

    def run() -> None:
        block(streams).square().mean().backward()
        streams.grad = None

    return run


def variants(options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """name -> one step, warmed up (and so compiled)."""
    kinds = {
        "plain": None,
        "mhc": HyperConfig(streams=options.streams),
        "mhc identity": HyperConfig(streams=options.streams, mix="identity"),
        "single pass": HyperConfig(streams=options.streams, kind="single_pass"),
        "hc": HyperConfig(streams=options.streams, kind="hc"),
    }
    steps = {}
    for name, config in kinds.items():
        block, hidden = Block(options.dim, options.time, config), torch.randn(1, options.time, options.dim)
        streams = enter(hidden, config).contiguous().requires_grad_()
        steps[f"{name}, eager"] = step(block, streams)
        if not options.eager and name in ("plain", "mhc"):
            steps[f"{name}, compiled"] = step(torch.compile(block), streams)
    for run in steps.values():
        run()
        run()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="width, a multiple of 32")
    parser.add_argument("--time", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    steps, seconds = variants(options), {}
    for _ in range(options.rounds):
        for name, run in steps.items():
            begin = time.perf_counter()
            run()
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: value / medians[f"plain, {name.split(', ')[1]}"] for name, value in medians.items()}
    if options.json:
        print(json.dumps({"options": vars(options), "seconds": medians, "times_plain": ratios}))
        return
    for name, value in medians.items():
        print(f"{name:24s} {1000 * value:9.2f} ms   {ratios[name]:5.2f} times plain")


if __name__ == "__main__":
    main()
