"""Times the engine that serves requests, and transformers on the same weights.

    python benchmarks/serving.py --threads 2
    python benchmarks/serving.py --only prefix chunks --json

`GOMP_SPINCOUNT=10000` in front of it is what `rorqual serve` sets.

The model is backbone.py's: DeepSeek-V3's architecture at 14M parameters, float32. Rounds are
interleaved; medians are printed.

    batch_8, batch_16   tokens per second of so many requests at once (prompts of 32 to 160 tokens,
                        64 new ones each, greedy), over transformers' generate() with a static batch
                        of them, and over one request alone
    chunks              99th percentile of the time between two tokens of 4 requests that decode
                        while a prompt of 3,000 tokens is read: `ratio` over the median of that
                        time, `undisturbed ratio` over the median before the prompt came
    chunks_32, _16, _8  the same with chunks of so many tokens in place of 64 (--prefill-chunk)
    together            seconds to read prompts of 3,000 and of 4 tokens together, over both apart
    prefix              seconds to the first token of a prompt that shares 1,000 tokens with an
                        earlier one, and 20 more, over those without the earlier one
    small_1, small_8    seconds of a decoding step of preset small (experts, Engram, four streams)
                        for so many requests, module by module over the compiled step's
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import backbone
import torch
from transformers import DeepseekV3ForCausalLM, PreTrainedModel

from rorqual.model import LanguageModel
from rorqual.presets import preset
from rorqual.serve.engine import Engine

NEW = 64  # tokens of an answer
CONTEXT = 4096


def draw(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    size = backbone.CONFIG.vocab_size
    return [torch.randint(1, size, (n,), generator=generator).tolist() for n in lengths]


def served(model: LanguageModel, prompts: list[list[int]]) -> float:
    """Returns the seconds in which an engine completes all prompts at once."""
    engine = Engine(model, max_batch_size=len(prompts), context=CONTEXT)
    return backbone.timed(lambda: engine.run(prompts, max_new_tokens=NEW))


@torch.inference_mode()
def generated(model: PreTrainedModel, prompts: list[list[int]]) -> float:
    """Returns the seconds of transformers' generate(), with a static batch padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return backbone.timed(lambda: model.generate(ids, attention_mask=mask, **options))


def batch(ours: LanguageModel, theirs: PreTrainedModel, size: int) -> dict[str, Callable]:
    lengths = torch.randint(32, 161, (size,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = draw(*lengths)
    return {
        "ours": lambda: served(ours, prompts),
        "transformers": lambda: generated(theirs, prompts),
        "one": lambda: served(ours, prompts[:1]) * size,
    }


def chunks(model: LanguageModel, size: int) -> dict[str, float]:
    """Returns the milliseconds between two tokens while a long prompt is read."""
    engine = Engine(model, max_batch_size=5, context=CONTEXT, prefill_chunk=size)
    for prompt in draw(40, 50, 60, 70):
        engine.submit(prompt, max_new_tokens=2000)
    for _ in range(20):
        engine.step()
    plain = [backbone.timed(engine.step) * 1e3 for _ in range(30)]
    (prompt,) = draw(3000)
    long = engine.submit(prompt, max_new_tokens=2)
    between = list[float]()
    while not long.ids:
        between.append(backbone.timed(engine.step) * 1e3)
    median = statistics.median(between)
    before = statistics.median(plain)
    last = sorted(between)[int(0.99 * len(between))]
    return {
        "median": median,
        "p99": last,
        "ratio": last / median,
        "median before": before,
        "undisturbed ratio": last / before,
        "first token of the long prompt, s": sum(between) / 1e3,
    }


def first_tokens(model: LanguageModel, *prompts: list[int], earlier: tuple = ()) -> float:
    """Returns the seconds until all prompts have their first token."""
    engine = Engine(model, context=CONTEXT)
    engine.run(earlier, max_new_tokens=1)
    requests = [engine.submit(prompt, max_new_tokens=1) for prompt in prompts]

    def until_done() -> None:
        while not all(request.ids for request in requests):
            engine.step()

    return backbone.timed(until_done)


def together(model: LanguageModel) -> dict[str, Callable]:
    long, short = draw(3000, 4)
    return {
        "ours": lambda: first_tokens(model, long) + first_tokens(model, short),
        "together": lambda: first_tokens(model, long, short),
    }


def prefix(model: LanguageModel) -> dict[str, Callable]:
    shared, one, other = draw(1000, 20, 20)
    return {
        "ours": lambda: first_tokens(model, shared + one, earlier=(shared + other,)),
        "without": lambda: first_tokens(model, shared + one),
    }


def modules(model: LanguageModel, prompts: list[list[int]], *, compiled: bool) -> float:
    """Returns the median seconds of a step in which all requests decode."""
    engine = Engine(model, max_batch_size=len(prompts), context=CONTEXT)
    if not compiled:
        # What the decoder itself does with a model that the compiled step does not fit.
        engine._runner._decoder._fits = False
    for prompt in prompts:
        engine.submit(prompt, max_new_tokens=NEW)
    for _ in range(3):
        engine.step()
    seconds = list[float]()
    while not engine.idle:
        seconds.append(backbone.timed(engine.step))
    return statistics.median(seconds)


def small(size: int) -> dict[str, Callable]:
    torch.manual_seed(0)
    model = LanguageModel(preset("small")).eval()
    prompts = draw(*range(40, 40 + 10 * size, 10))
    return {
        "ours": lambda: modules(model, prompts, compiled=True),
        "modules": lambda: modules(model, prompts, compiled=False),
    }


def measure(
    name: str, ours: LanguageModel, theirs: PreTrainedModel, rounds: int
) -> dict[str, float]:
    if name.startswith("chunks"):
        size = int(name.removeprefix("chunks").lstrip("_") or 64)
        rounds_of = [chunks(ours, size) for _ in range(rounds)]
        return {key: statistics.median(one[key] for one in rounds_of) for key in rounds_of[0]}
    if name.startswith("batch_"):
        size = int(name.removeprefix("batch_"))
        steps = batch(ours, theirs, size)
        answer = backbone.compare(steps.pop("ours"), steps, rounds)
        return answer | {"tokens per second": size * NEW / answer["ours ms"] * 1e3}
    if name.startswith("small_"):
        steps = small(int(name.removeprefix("small_")))
    else:
        steps = {"together": together, "prefix": prefix}[name](ours)
    return backbone.compare(steps.pop("ours"), steps, rounds)


SMALLER = ("chunks_32", "chunks_16", "chunks_8")
NAMES = ("batch_8", "batch_16", "chunks", "together", "prefix", "small_1", "small_8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=NAMES + SMALLER, default=NAMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    answer = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = backbone.pair(Path(folder), backbone.CONFIG, DeepseekV3ForCausalLM)
        # The compiled step is there before anything is timed.
        began = time.perf_counter()
        backbone.Step.keep()
        print(f"compiled in {time.perf_counter() - began:.0f} s")
        for name in options.only:
            answer[name] = measure(name, ours, theirs, options.rounds)
            if not options.json:
                values = ", ".join(f"{key} {value:.2f}" for key, value in answer[name].items())
                print(f"{name}: {values}", flush=True)
    if options.json:
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
