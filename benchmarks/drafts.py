"""Times plain greedy decoding against drafts, by depth, batch and share of accepted drafts.

    python benchmarks/drafts.py
    python benchmarks/drafts.py --preset small --depths 1 2 --acceptance 0 0.5 0.8 1 --json

The modules of an untrained model draft at full cost, and their drafts are then replaced: by the id
that the model itself will choose with the probability `--acceptance`, else by another id. The text
is that of plain decoding for every setting, which is checked. `plain` is what an engine takes
without drafts, a compiled step where the model has one; `forwards` is one forward pass of PyTorch
per token, which drafts must beat where there is no compiled step. Tokens a second of all sequences
together, float32, the median over the rounds, in which the kinds take turns; with --cpu of the
processor's time instead of the clock's.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rorqual.config import replace
from rorqual.layers.cache import Cache
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.serve.decoding import decode
from rorqual.serve.drafts import AcceptanceStats, Drafter
from rorqual.serve.scheduler import Request

Texts = list[list[int]]


def texts(steps: Any) -> Texts:
    """Returns the ids of each sequence, all of the same length."""
    return [list(row) for row in zip(*steps, strict=True)]


@torch.inference_mode()
def forwards(model: LanguageModel, prompts: Texts, count: int) -> Texts:
    """Decodes greedily with one forward pass per token and a cache, without the compiled step."""
    cache = model.new_cache(len(prompts), len(prompts[0]) + count)
    ids = torch.tensor(prompts)
    generated = []
    for _ in range(count):
        logits = model.logits(model.hidden(ids, cache=cache, last=True)[0])
        ids = logits[:, -1:].argmax(-1)
        generated.append(ids[:, 0].tolist())
    return texts(generated)


def drafts(prompts: Texts, following: Texts, acceptance: float) -> Callable[..., Tensor]:
    """Returns a replacement of `Drafter.propose` that does the same work and replaces the result.

    Each draft is accepted with the probability `acceptance`.
    """
    generator = torch.Generator().manual_seed(0)
    propose = Drafter.propose
    true = dict(zip(map(tuple, prompts), following, strict=True))

    def made(self: Drafter, requests: Sequence[Request], cache: Cache) -> Tensor:
        out = propose(self, requests, cache)
        rows = []
        for request in requests:
            ids = true[request.prompt]
            first = len(request.ids)
            rows.append((ids + [0] * self.depths)[first : first + self.depths])
        right = torch.rand(out.shape, generator=generator) < acceptance
        return torch.where(right, torch.tensor(rows), (torch.tensor(rows) + 1) % self.vocab_size)

    return made


def timed(
    call: Callable[[], Texts], expected: Texts | None, clock: Callable[[], float]
) -> tuple[float, Texts]:
    start = clock()
    generated = call()
    seconds = clock() - start
    assert expected is None or generated == expected, "another text"
    return sum(map(len, generated)) / seconds, generated


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns tokens per second of each kind, and how many ids a round of drafts yields."""
    clock = time.process_time if options.cpu else time.perf_counter
    return [
        row
        for depth in options.depths
        for batch in options.batch
        for row in measured(options, depth, batch, clock)
    ]


def measured(
    options: argparse.Namespace, depth: int, batch: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    config = replace(preset(options.preset), "mtp", MTPConfig(depth=depth))
    model = LanguageModel(replace(config, "init_std", 0.1)).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, config.vocab_size, (batch, 32), generator=generator).tolist()
    wanted: dict[str, Any] = {"max_new_tokens": options.tokens}
    following = texts(decode(model, prompts, **wanted))
    counts = {share: AcceptanceStats() for share in options.acceptance}

    def drafted(share: float) -> Texts:
        with mock.patch.object(Drafter, "propose", drafts(prompts, following, share)):
            return texts(decode(model, prompts, acceptance_stats=counts[share], **wanted))

    kinds: dict[str, Callable[[], Texts]] = {
        "plain": lambda: texts(decode(model, prompts, **wanted)),
        "forwards": lambda: forwards(model, prompts, options.tokens),
    }
    kinds |= {f"drafts {share}": lambda share=share: drafted(share) for share in options.acceptance}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(options.rounds + 1):
        for kind, call in kinds.items():
            # With other rounding, another of two ids with equal scores may be chosen.
            speed, _ = timed(call, None if kind == "forwards" else following, clock)
            if turn:
                speeds[kind].append(speed)
    plain, eager = (statistics.median(speeds[kind]) for kind in ("plain", "forwards"))
    rows = []
    for share, stats in counts.items():
        speed = statistics.median(speeds[f"drafts {share}"])
        rows.append(
            {
                "depth": depth,
                "batch": batch,
                "acceptance": share,
                "accepted": stats.acceptance,
                # Of a sequence, until the last one has ended.
                "ids_a_round": options.tokens * (options.rounds + 1) / stats.rounds,
                "plain": plain,
                "forwards": eager,
                "drafts": speed,
                "over_plain": speed / plain,
                "over_forwards": speed / eager,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.0, 0.5, 0.8, 1.0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps(rows))
        return
    print(
        "depth  batch  drafts that stand  ids a round    plain  forwards   drafts  "
        "over plain  over forwards"
    )
    for row in rows:
        print(
            f"{row['depth']:5}  {row['batch']:5}  {row['acceptance']:17.2f}  "
            f"{row['ids_a_round']:11.2f}  {row['plain']:7.1f}  {row['forwards']:8.1f}  "
            f"{row['drafts']:7.1f}  {row['over_plain']:10.2f}  {row['over_forwards']:13.2f}"
        )


if __name__ == "__main__":
    main()
