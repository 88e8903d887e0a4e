"""Times plain greedy decoding against drafts, by depth and by the share of accepted drafts.

    python benchmarks/drafts.py
    python benchmarks/drafts.py --preset small --depths 1 2 --acceptance 0 0.5 0.8 1 --json

The modules of an untrained model draft at full cost, and their drafts are then replaced: by the id
that the model itself will choose with the probability `--acceptance`, else by another id. The text
is that of plain decoding for every setting, which is checked. `plain` is what `decode` takes, a
compiled step where the model has one; `forwards` is one forward pass of PyTorch per token, which
drafts must beat where there is no compiled step. Batch size 1, float32, the median over the rounds,
in which the kinds take turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rorqual.config import replace
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.serve import decoding
from rorqual.serve.decoding import AcceptanceStats, decode, speculate


def tokens(steps: Any) -> list[int]:
    return [token for (token,) in steps]


@torch.inference_mode()
def forwards(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Decodes greedily with one forward pass per token and a cache, without the compiled step."""
    cache, ids, generated = model.new_cache(1, len(prompt) + count), torch.tensor([prompt]), []
    for _ in range(count):
        logits = model.logits(model.hidden(ids, cache=cache, last=True)[0])
        generated.append(int(logits[0, -1].argmax()))
        ids = torch.tensor([generated[-1:]])
    return generated


def drafts(text: list[int], acceptance: float, vocab_size: int) -> Callable[..., Tensor]:
    """Returns a replacement of `_drafts` that does the same work and replaces the result.

    Each draft is accepted with the probability `acceptance`.
    """
    generator, work = torch.Generator().manual_seed(0), decoding._drafts

    def made(model: LanguageModel, state: decoding.DraftState, cache: Any, limit: int) -> Tensor:
        out = work(model, state, cache, limit)
        # The cache has all known tokens but the last.
        offset = cache.past.length + 1
        true = torch.tensor([(text + [0] * out.shape[1])[offset : offset + out.shape[1]]])
        stands = torch.rand(out.shape, generator=generator) < acceptance
        return torch.where(stands, true, (true + 1) % vocab_size)

    return made


def timed(call: Callable[[], list[int]], expected: list[int] | None) -> tuple[float, list[int]]:
    start = time.perf_counter()
    generated = call()
    seconds = time.perf_counter() - start
    assert expected is None or generated == expected, "another text"
    return len(generated) / seconds, generated


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns tokens per second of each kind, and how many ids a round of drafts yields."""
    rows = []
    for depth in options.depths:
        config = replace(preset(options.preset), "mtp", MTPConfig(depth=depth))
        model = LanguageModel(replace(config, "init_std", 0.1)).eval()
        prompt = torch.randint(
            1, config.vocab_size, (32,), generator=torch.Generator().manual_seed(1)
        ).tolist()
        text = tokens(decode(model, [prompt], max_new_tokens=options.tokens))
        tallies = {share: AcceptanceStats() for share in options.acceptance}

        def drafted(
            share: float, model=model, prompt=prompt, text=text, tallies=tallies
        ) -> list[int]:
            replaced = drafts(prompt + text, share, model.config.vocab_size)
            with mock.patch.object(decoding, "_drafts", replaced):
                return tokens(
                    speculate(
                        model,
                        [prompt],
                        max_new_tokens=options.tokens,
                        acceptance_stats=tallies[share],
                    )
                )

        kinds: dict[str, Callable[[], list[int]]] = {
            "plain": lambda m=model, p=prompt: tokens(
                decode(m, [p], max_new_tokens=options.tokens)
            ),
            "forwards": lambda m=model, p=prompt: forwards(m, p, options.tokens),
        }
        kinds |= {
            f"drafts {share}": lambda share=share: drafted(share) for share in options.acceptance
        }
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(options.rounds + 1):
            for kind, call in kinds.items():
                # With other rounding, another of two ids with equal scores may be chosen.
                speed, _ = timed(call, None if kind == "forwards" else text)
                if turn:
                    speeds[kind].append(speed)
        plain, eager = (statistics.median(speeds[kind]) for kind in ("plain", "forwards"))
        for share, acceptance_stats in tallies.items():
            speed = statistics.median(speeds[f"drafts {share}"])
            rows.append(
                {
                    "depth": depth,
                    "acceptance": share,
                    "ids_a_round": (options.tokens * (options.rounds + 1))
                    / acceptance_stats.rounds,
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
    parser.add_argument("--acceptance", type=float, nargs="+", default=[0.0, 0.5, 0.8, 1.0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    if options.json:
        print(json.dumps(rows))
        return
    print(
        "depth  drafts that stand  ids a round    plain  forwards   drafts  "
        "over plain  over forwards"
    )
    for row in rows:
        print(
            f"{row['depth']:5}  {row['acceptance']:17.2f}  {row['ids_a_round']:11.2f}  "
            f"{row['plain']:7.1f}  {row['forwards']:8.1f}  {row['drafts']:7.1f}  "
            f"{row['over_plain']:10.2f}  {row['over_forwards']:13.2f}"
        )


if __name__ == "__main__":
    main()
