"""Trains a small DeepSeek-V3 on one sentence, and prints and draws the data at every step.

    python examples/deepseek_v3.py
    python examples/deepseek_v3.py --draw flow.svg
    python examples/deepseek_v3.py --bias-rate 0 --balance-loss 0.02 --noise 0.5 --adaptive-mass 0.6
    python examples/deepseek_v3.py --compare

The second command draws the data flow, the experts of each letter and their load (it needs
matplotlib: the extra `report`). Flags switch on what keeps experts evenly loaded, and the fourth
command trains once with each switch alone and prints what it does.
"""

import argparse
import importlib.util
import math
import string
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rorqual.costs import costs
from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import BalanceConfig, max_violation, update_bias
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.presets import preset
from rorqual.serve.decoding import speculate
from rorqual.serve.drafts import AcceptanceStats

TEXT = "the blue whale sings; the blue whale dives; the sea is blue and wide. " * 2
# a vocabulary of 100 letters
IDS = torch.tensor([[string.printable.index(letter) for letter in TEXT]])


class Stage(NamedTuple):
    """A module that the data passes: what leaves it, where it is drawn, what it reads."""

    note: str
    row: int
    column: int
    inputs: tuple[str, ...] = ()


# In the order of the data. What a block adds to the residual stream is drawn, the stream is not.
FLOW = {
    "embed": Stage("a vector of 64 numbers for each letter", 0, 0),
    "blocks.0.attention.q_a_proj": Stage("the latent that queries are made of", 1, -1, ("embed",)),
    "blocks.0.attention.q_b_proj": Stage(
        "queries of 4 heads, 16 + 8 (rope) numbers each", 2, -1, ("blocks.0.attention.q_a_proj",)
    ),
    "blocks.0.attention.kv_a_proj_with_mqa": Stage(
        "latent and rope key: all that is cached", 2, 1, ("embed",)
    ),
    "blocks.0.attention.o_proj": Stage(
        "what the heads have read, back at the width",
        3,
        0,
        ("blocks.0.attention.q_b_proj", "blocks.0.attention.kv_a_proj_with_mqa"),
    ),
    "blocks.0.ffn.router": Stage(
        "the experts of each letter", 4, -1, ("blocks.0.attention.o_proj",)
    ),
    "blocks.0.ffn.experts": Stage(
        "a row for each letter and expert, sorted by expert", 5, -1, ("blocks.0.ffn.router",)
    ),
    "blocks.0.ffn.shared": Stage(
        "the shared expert, which every letter takes", 5, 1, ("blocks.0.attention.o_proj",)
    ),
    "blocks.0.ffn": Stage(
        "the weighted sum of both", 6, 0, ("blocks.0.ffn.experts", "blocks.0.ffn.shared")
    ),
    "blocks.1": Stage("the second block: the same again", 7, 0, ("blocks.0.ffn",)),
    "norm": Stage("what the head reads: the next letter", 8, -1, ("blocks.1",)),
    "mtp.0": Stage("hidden states for the letter after the next", 8, 1, ("blocks.1",)),
}


class Switches(NamedTuple):
    """What may keep the load of the experts even, and how many experts a letter takes."""

    bias_rate: float = 0.02  # loss-free balance: the bias of an expert moves by it once a step
    balance_loss: float = 1e-4  # coefficient of the balance loss of a sequence
    noise: float = 0.0  # standard deviation of the noise on the router's logits
    adaptive_mass: float | None = None  # a letter takes experts until they have this share


class Record(NamedTuple):
    """The losses and loads of a training step."""

    next_letter: float  # nats
    second_letter: float  # nats, of multi-token prediction
    counts: Tensor  # [layers, experts], letters that each expert took

    @property
    def entropy(self) -> float:
        """The entropy of the load in bits, a mean over the layers: 2 if 4 experts share alike."""
        shares = self.counts / self.counts.sum(-1, keepdim=True)
        return float(-torch.special.xlogy(shares, shares).sum(-1).mean()) / math.log(2)

    @property
    def violation(self) -> float:
        """MaxVio, a mean over the layers: 0 if all experts share alike."""
        return sum(max_violation(counts) for counts in self.counts) / len(self.counts)

    @property
    def experts(self) -> float:
        """Experts that a letter takes; MTP reads one letter less than the blocks."""
        return float(self.counts[0].sum() / (IDS.shape[1] - 1))


def build(switches: Switches) -> ModelConfig:
    """Returns the preset `classroom` with what DeepSeek-V3 has besides."""
    classroom = preset("classroom")
    attention = MLAConfig(
        heads=4, q_lora_rank=24, kv_lora_rank=16, nope_dim=16, rope_dim=8, value_dim=16
    )
    router = RouterConfig(noise=switches.noise, adaptive_mass=switches.adaptive_mass)
    balance = BalanceConfig(bias_rate=switches.bias_rate, sequence=switches.balance_loss)
    moe = replace(classroom.moe, shared=1, router=router, balance=balance)
    return replace(classroom, gqa=None, mla=attention, moe=moe, mtp=MTPConfig())


def train(model: LanguageModel, switches: Switches, steps: int) -> Iterator[Record]:
    """Trains the model on the text, and yields a record of every step."""
    torch.manual_seed(0)  # of the router's noise
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    blocks = [*model.blocks, model.mtp[0].block]
    for _ in range(steps):
        # next letter + 0.3 * the one after it (MTP) + balance losses
        loss = model.loss(IDS[:, :-1], IDS[:, 1:])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        # The biases move without a gradient.
        for block, counts in zip(blocks, loss.counts, strict=True):
            update_bias(block.ffn.router.e_score_correction_bias, counts, switches.bias_rate)
        yield Record(loss.next_token.item(), loss.mtp.item(), loss.counts)
    model.eval()


def flow(model: LanguageModel) -> dict[str, list[int]]:
    """Runs the model once, and returns the shape that leaves each module of FLOW."""
    shapes = {}

    def hook(name: str):
        def record(module, inputs, output) -> None:
            # Of a block, of a mixture and of a router the hidden states or the experts come first.
            while not isinstance(output, Tensor):
                output = output.values if hasattr(output, "values") else output[0]
            shapes[name] = list(output.shape)

        return record

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(hook(name)) for name in FLOW]
    with torch.no_grad():
        model.loss(IDS[:, :-1], IDS[:, 1:])
    for handle in handles:
        handle.remove()
    return {name: shapes[name] for name in FLOW}


def routes(model: LanguageModel) -> list[Tensor]:
    """Returns the weights of the experts of each letter, [letters, experts], block by block."""
    with torch.no_grad():
        _, auxes = model.hidden(IDS)
    weights = []
    for routing in (aux.routing for aux in auxes):
        dense = torch.zeros_like(routing.scores[0])
        weights.append(dense.scatter(1, routing.topk_indices[0], routing.weights[0]))
    return weights


def draw(model: LanguageModel, records: list[Record], file: str) -> None:
    """Draws the data flow with its shapes, the experts of the first letters, and their load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    widths = [3.2, 0.6, 0.6, 1.5]
    diagram, *maps, curve = figure.subplots(1, 4, width_ratios=widths)
    draw_flow(diagram, flow(model))
    letters = TEXT[:22]
    for layer, (axes, weights) in enumerate(zip(maps, routes(model), strict=True)):
        axes.imshow(weights[: len(letters)], cmap="Blues", aspect="auto", vmin=0, vmax=1)
        axes.set_title(f"experts, block {layer}")
        axes.set_xticks(range(weights.shape[1]))
        axes.set_yticks(range(len(letters)), [repr(letter) for letter in letters], fontsize=7)
    curve.plot([record.violation for record in records], label="MaxVio, 0 is even")
    curve.plot([record.entropy for record in records], label="entropy of the load, 2 bits is even")
    curve.plot([record.next_letter for record in records], label="loss, nats a letter")
    curve.set_xlabel("step")
    curve.set_ylim(0, 5)
    curve.set_title("load and loss")
    curve.legend(fontsize=7)
    figure.savefig(file)


def draw_flow(axes, shapes: dict[str, list[int]]) -> None:
    """Draws a box for each module of FLOW, and a line from each module that it reads."""
    axes.axis("off")
    axes.set_title("data flow of a step")
    axes.set_xlim(-2, 2)
    axes.set_ylim(8.6, -0.6)
    box = {"boxstyle": "round", "facecolor": "#e8eef8", "edgecolor": "#2f7fd1"}
    for name, stage in FLOW.items():
        label = f"{name.removeprefix('blocks.0.')} {shapes[name]}\n{stage.note}"
        axes.text(stage.column, stage.row, label, ha="center", va="center", fontsize=7, bbox=box)
        for source in (FLOW[name] for name in stage.inputs):
            axes.annotate(
                "",
                (stage.column, stage.row - 0.3),
                (source.column, source.row + 0.3),
                arrowprops={"arrowstyle": "->", "color": "#555555"},
            )


def compare(steps: int) -> None:
    """Trains with each switch alone, from the same start, and prints what it does."""
    off = Switches(bias_rate=0.0, balance_loss=0.0)
    arms = {
        "none": off,
        "bias (loss-free)": off._replace(bias_rate=0.02),
        "balance loss": off._replace(balance_loss=0.1),
        "noisy gate": off._replace(noise=1.0),
        "adaptive k": off._replace(adaptive_mass=0.5),
    }
    print(f"   {'switched on':17s} entropy  MaxVio  experts a letter  next letter")
    for name, switches in arms.items():
        records = list(train(LanguageModel(build(switches)), switches, steps))
        # Single steps jump: the last quarter is averaged.
        last = records[-max(1, steps // 4) :]
        entropy, violation, experts, loss = (
            sum(getattr(record, field) for record in last) / len(last)
            for field in ("entropy", "violation", "experts", "next_letter")
        )
        load = f"{entropy:4.2f} bit   {violation:5.2f}  {experts:16.2f}"
        print(f"   {name:17s} {load}  {loss:6.3f} nats")


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    """Returns the options that are typed; exits with a line about one that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    defaults = Switches()
    parser.add_argument("--bias-rate", type=float, default=defaults.bias_rate, help="0: no bias")
    parser.add_argument("--balance-loss", type=float, default=defaults.balance_loss, help="0: none")
    parser.add_argument(
        "--noise", type=float, default=defaults.noise, help="of the router's logits"
    )
    parser.add_argument("--adaptive-mass", type=float, help="share of the scores, up to 1")
    parser.add_argument("--steps", type=int, default=101)
    parser.add_argument("--draw", metavar="FILE", help="draw the data flow into this file")
    parser.add_argument("--compare", action="store_true", help="train once with each switch alone")
    options = parser.parse_args(words)
    if options.steps < 1:
        parser.error(f"got --steps {options.steps}, expected at least 1")
    if options.draw and importlib.util.find_spec("matplotlib") is None:
        parser.error("--draw needs matplotlib: pip install 'rorqual[report]'")
    options.switches = Switches(*(getattr(options, field) for field in Switches._fields))
    try:
        build(options.switches)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    options = options_of()
    switches = options.switches
    classroom = preset("classroom")
    print(
        f"1. classroom: {costs(classroom).total:,} parameters, {costs(classroom).activated:,} "
        "activated a token"
    )
    config = build(switches)
    model = LanguageModel(config)
    size = costs(config)
    print(
        "   with latent attention, a shared expert and multi-token prediction: "
        f"{size.total:,} + {size.mtp:,} for MTP"
    )

    print("2. the data flow, with the shapes that leave each module:")
    for name, shape in flow(model).items():
        print(f"   {name:38s} {shape!s:15s} {FLOW[name].note}")
    for layer, weights in enumerate(routes(model)):
        shown = (
            f"{letter!r} to "
            + " ".join(f"{e} by {w[e]:.2f}" for e in w.nonzero().flatten().tolist())
            for letter, w in zip(TEXT[:5], weights, strict=False)
        )
        print(f"   block {layer}: {', '.join(shown)}")

    print(
        "3. training: next letter + 0.3 * the one after it (MTP) + balance; biases move once a "
        "step, without a gradient"
    )
    records = []
    for step, record in enumerate(train(model, switches, options.steps)):
        records.append(record)
        if step % 20 == 0:
            load = ", ".join(f"{max_violation(counts):.2f}" for counts in record.counts)
            print(
                f"   step {step:2d}: next {record.next_letter:.3f} nats, the one after "
                f"{record.second_letter:.3f}, MaxVio {load}, {record.experts:.2f} experts a letter"
            )

    cache = model.new_cache(batch=1)
    model(IDS[:, :20], cache=cache)
    latent = cache.layers[0].attention.latent
    cached = latent.stored[:, : cache.length]
    print(
        f"4. the cache after {cache.length} letters: {list(cached.shape)} a layer, latent and "
        "rope key"
    )
    print(
        f"   {cached.shape[-1]} values a token, where 4 heads of keys and values would keep "
        f"{4 * (16 + 8 + 16)}"
    )

    prompt = IDS[0, :4].tolist()
    stats = AcceptanceStats()
    generated = "".join(
        string.printable[i]
        for (i,) in speculate(model, [prompt], max_new_tokens=60, acceptance_stats=stats)
    )
    print(f"5. {TEXT[:4]!r} goes on {generated!r}")
    print(
        f"   MTP drafted {stats.drafted} letters, {stats.accepted} stood; "
        f"60 letters took {stats.rounds + 1} forwards"
    )

    if options.draw:
        draw(model, records, options.draw)
        print(f"   drawn: {options.draw}")
    if options.compare:
        print(f"6. {options.steps} steps with each switch alone, one seed, last quarter:")
        compare(options.steps)


if __name__ == "__main__":
    main()
