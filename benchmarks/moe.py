"""Times one mixture-of-experts layer against transformers' DeepseekV3MoE with the same weights.

    python benchmarks/moe.py --tokens 4096 --dim 256 --width 128 --experts 32 --active 4

It times forward and backward. The peer runs in each of transformers' implementations; outputs are
checked to agree. Interleaved medians are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from rorqual.layers.context import context
from rorqual.layers.moe import MoE, MoEConfig
from rorqual.layers.router import RouterConfig

WAYS = ("eager", "grouped_mm")


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the milliseconds of each step.

    It is the median of interleaved rounds, after one to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) * 1e3 for name, times in seconds.items()}


def peer(ours: MoE, dim: int, way: str) -> DeepseekV3MoE:
    """Returns transformers' layer with our weights."""
    config = DeepseekV3Config(
        hidden_size=dim, num_attention_heads=2, moe_intermediate_size=ours.config.width,
        n_shared_experts=1,
        n_routed_experts=ours.config.routed, num_experts_per_tok=ours.config.active, n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
    )  # fmt: skip
    config._experts_implementation = way
    result = DeepseekV3MoE(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(result.shared_experts, name).weight.data = getattr(
            ours.shared, name
        ).weight.data.clone()
    result.gate.weight.data = ours.router.weight.data.clone()
    result.experts.gate_up_proj.data = ours.experts.gate_up.data.transpose(1, 2).contiguous()
    result.experts.down_proj.data = ours.experts.down.data.transpose(1, 2).contiguous()
    return result


def both_ways(layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Callable[[], Tensor]:
    """Returns one forward and backward pass, into the input and every weight.

    Gradients add up, as over micro-batches.
    """
    leaf = hidden.clone().requires_grad_()

    def step() -> Tensor:
        out = layer(leaf)
        (out * hidden).sum().backward()
        return out.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (
        ("tokens", 4096),
        ("dim", 256),
        ("width", 128),
        ("experts", 32),
        ("active", 4),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = MoEConfig(
        routed=options.experts, active=options.active, width=options.width, router=RouterConfig()
    )
    mine = MoE(config, options.dim)
    hidden = torch.randn(1, options.tokens, options.dim)
    where = context(1, options.tokens, hidden.device)
    steps = {"rorqual": both_ways(lambda x: mine(x, where)[0], hidden)}
    steps |= {
        f"transformers {way}": both_ways(peer(mine, options.dim, way), hidden) for way in WAYS
    }
    ours, *others = (step() for step in steps.values())
    for other in others:
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)
    result = measure(steps, options.rounds)
    ratios = {f"moe_vs_{way}": result[f"transformers {way}"] / result["rorqual"] for way in WAYS}
    # The last ratio is against the fastest implementation.
    ratios["moe_vs_transformers"] = min(ratios.values())
    if options.json:
        print(json.dumps(ratios | {"milliseconds": result, "threads": torch.get_num_threads()}))
        return
    print(
        f"{options.tokens} tokens, {options.active} of {options.experts} experts, "
        f"{torch.get_num_threads()} threads"
    )
    print(
        *(f"{name:24} {ms:9.2f} ms {ms / result['rorqual']:7.2f} x" for name, ms in result.items()),
        sep="\n",
    )


if __name__ == "__main__":
    main()
