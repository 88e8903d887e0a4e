"""Times one engine step that admits prompts of unlike length against a step for each alone.

    python benchmarks/serving.py
    python benchmarks/serving.py --attentions nsa dsa --prompts 3000 4 --threads 2 --json

The model has two layers of width 128 with random weights, float32. `alone` is a step for each
prompt in an engine of its own, `together` one step that admits all of them, `padded` one prefill of
all of them as a padded batch, which is what the engine did before it sorted prompts by length.
Rounds are interleaved; medians are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.decoding import pad_left
from rorqual.serve.engine import Engine

VOCAB_SIZE = 4096
GQA = GQAConfig(heads=8, kv_heads=2, head_dim=32)
ATTENTIONS = {
    "mla": {"mla": MLAConfig(heads=8)},
    "gqa": {"mla": None, "gqa": GQA},
    "window": {"mla": None, "gqa": GQAConfig(heads=8, kv_heads=2, head_dim=32, window=128)},
    "nsa": {"mla": None, "gqa": GQA, "nsa": NSAConfig()},
    "moba": {"mla": None, "gqa": GQA, "moba": MoBAConfig(block=128)},
    "dsa": {"mla": MLAConfig(heads=8), "dsa": DSAConfig(top_k=256)},
}


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def admit(model: LanguageModel, prompts: list[list[int]]) -> None:
    """Runs one step of an engine in which all prompts are waiting."""
    engine = Engine(model, max_batch_size=len(prompts), context=64 + max(map(len, prompts)))
    for prompt in prompts:
        engine.submit(prompt)
    engine.step()


@torch.inference_mode()
def pad(model: LanguageModel, prompts: list[list[int]]) -> None:
    """Runs one prefill of all prompts as a padded batch."""
    ids, attention_mask = pad_left(prompts, 0)
    cache = model.new_cache(len(prompts), capacity=ids.shape[1])
    model.logits(model.hidden(ids, attention_mask=attention_mask, cache=cache, last=True)[0])


def measure(attention: str, lengths: list[int], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each way to admit the prompts."""
    config = ModelConfig(vocab_size=VOCAB_SIZE, dim=128, layers=2, **ATTENTIONS[attention])
    model = LanguageModel(config, seed=0).eval()
    prompts = [torch.randint(0, VOCAB_SIZE, (length,)).tolist() for length in lengths]
    ways = {
        "alone": lambda: [admit(model, [prompt]) for prompt in prompts],
        "together": lambda: admit(model, prompts),
        "padded": lambda: pad(model, prompts),
    }
    admit(model, [[1, 2, 3]])
    taken = [{name: timed(work) for name, work in ways.items()} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in taken) for name in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--attentions", nargs="*", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--prompts", nargs="*", type=int, default=[3000, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.attentions:
        seconds = results[name] = measure(name, options.prompts, options.rounds)
        if not options.json:
            ratios = ", ".join(
                f"{way} {seconds[way] / seconds['alone']:.2f}" for way in ("together", "padded")
            )
            print(f"{name:8} alone {seconds['alone']:.3f} s; times that: {ratios}", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
