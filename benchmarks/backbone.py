"""Times DeepSeek's architectures at 14M parameters against transformers on the same weights.

    python benchmarks/backbone.py --threads 2
    python benchmarks/backbone.py --model deepseek-v4
    python benchmarks/backbone.py --only decode_512 train_float32 --json

It measures prefill, decoding and training. Our model is exported to a folder that transformers
loads with its default experts and attention; logits are checked to agree to 1e-4 of their largest.
Every figure is our tokens per second over transformers' tokens per second, the median over
interleaved rounds:

    prefill_N   a prompt of N tokens into each library's own cache, logits of the last position
    decode_N    greedy, one prompt of N tokens, each library's own loop and cache;
                decode_N_llamacpp is the same over llama.cpp's tokens per second, where gguf and
                xllamacpp are installed
    train_D     8 x 256 tokens: loss, backward, fused AdamW; float32, bfloat16 (weights too),
                autocast (weights float32)
"""

import argparse
import copy
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3ForCausalLM,
    DeepseekV4ForCausalLM,
    DeepseekV32ForCausalLM,
    DynamicCache,
    PreTrainedModel,
)

from rorqual.hub import checkpoints
from rorqual.kernels.step import Step
from rorqual.layers.attention import MLAConfig
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.csa import CSAConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.decoding import decode

CONFIG = ModelConfig(
    vocab_size=8192,
    dim=256,
    layers=6,
    dense_width=512,
    mla=MLAConfig(heads=8, q_lora_rank=96, kv_lora_rank=64, nope_dim=32, rope_dim=16, value_dim=32),
    moe=MoEConfig(
        routed=16,
        active=4,
        shared=1,
        width=128,
        first_dense=1,
        router=RouterConfig(scale=2.5),
        balance=BalanceConfig(sequence=0.0),  # transformers has none
    ),
    init_std=0.05,
)
# Index heads. The products of 8 are all negative for one key in 256, so scores of 0 tie, and ours
# computes the cached tokens again for a selection that does not depend on the cache; transformers
# does not. The released models have 64 heads and no ties.
INDEX_HEADS = 16
# Of equal scores transformers selects those of torch.topk; it does not train the indexer.
V32 = replace(CONFIG, dsa=DSAConfig(heads=INDEX_HEADS, dim=32, top_k=256, ties="topk", weight=0.0))
V4 = ModelConfig(
    vocab_size=8192,
    dim=256,
    layers=6,
    mla=None,
    csa=CSAConfig(
        heads=8,
        head_dim=64,
        rope_dim=16,
        q_lora_rank=96,
        groups=2,
        o_lora_rank=64,
        window=128,
        kinds=("window", "window", "csa", "hca", "csa", "hca"),
        index_heads=INDEX_HEADS,
        index_dim=32,
        top_k=256,
        ties="topk",
        weight=0.0,  # transformers does not train the indexer
    ),
    moe=MoEConfig(
        routed=16,
        active=4,
        shared=1,
        width=128,
        swiglu_limit=10.0,
        router=RouterConfig(score="sqrtsoftplus", scale=1.5, token_id_layers=1),
        balance=BalanceConfig(sequence=0.0),
    ),
    hyper=HyperConfig(),
    init_std=0.05,
)
# Our config, transformers' class, and the lengths of prompts, of each model.
MODELS = {
    "deepseek-v3": (CONFIG, DeepseekV3ForCausalLM, (512, 2048)),
    "deepseek-v3.2": (V32, DeepseekV32ForCausalLM, (2048, 8192)),
    "deepseek-v4": (V4, DeepseekV4ForCausalLM, (2048, 8192)),
}
LONGEST = 16384  # positions
NEW = 64  # tokens decoded per round
BATCH = 8
TIME = 256

Timed = Callable[[], float]  # seconds


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(ours: Timed, theirs: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Returns the seconds of each of `theirs` over ours, and the least milliseconds of all.

    A ratio is the median over rounds in which each runs once.
    """
    taken: dict[str, list[float]] = {name: [] for name in ("ours", *theirs)}
    for turn in range(rounds + 1):
        for name, step in (("ours", ours), *theirs.items()):
            seconds = step()
            if turn:
                taken[name].append(seconds)
    ratios = {
        name: statistics.median(b / a for a, b in zip(taken["ours"], taken[name], strict=True))
        for name in theirs
    }
    return ratios | {f"{name} ms": min(values) * 1e3 for name, values in taken.items()}


def pair(
    folder: Path, config: ModelConfig, cls: type[PreTrainedModel]
) -> tuple[LanguageModel, PreTrainedModel]:
    """Returns our model and transformers' with the same weights.

    AssertionError where their logits differ.
    """
    ours = LanguageModel(config, seed=0).eval()
    checkpoints.export(ours, folder, max_position_embeddings=LONGEST)
    theirs = cls.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, config.vocab_size, (2, 300))
    with torch.no_grad():
        expected = theirs(ids).logits
        result = ours(ids)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    return ours, theirs


def agreed(vocab_size: int, length: int, agrees: Callable[[Tensor], bool]) -> Tensor:
    """Returns the first prompt of at most eight drawn ones on which both libraries agree.

    Over thousands of tokens two index scores, or two of a router, now and then differ by less than
    float32 resolves: then each library selects another entry, and what follows differs by more
    than any tolerance. In float64 there is no such prompt (benchmarks/families.py compares so).
    AssertionError where all eight differ.
    """
    for number in range(8):
        ids = torch.randint(0, vocab_size, (1, length))
        if agrees(ids):
            if number:
                print(f"passed over {number} prompts with scores that tie", file=sys.stderr)
            return ids
    raise AssertionError(f"the libraries differ on 8 prompts of {length} tokens")


def prefill(
    ours: LanguageModel, theirs: PreTrainedModel, length: int
) -> tuple[Timed, dict[str, Timed]]:
    @torch.inference_mode()
    def one_forward(ids: Tensor) -> Tensor:
        return ours.logits(ours.hidden(ids, cache=ours.new_cache(1, length), last=True)[0])

    @torch.inference_mode()
    def peer(ids: Tensor) -> Tensor:
        return theirs(
            ids,
            past_key_values=DynamicCache(config=theirs.config),
            use_cache=True,
            logits_to_keep=1,
        ).logits

    ids = agreed(
        ours.config.vocab_size,
        length,
        lambda ids: torch.allclose(one_forward(ids), peer(ids), rtol=1e-3, atol=1e-4),
    )
    return (lambda: timed(lambda: one_forward(ids))), {
        "transformers": lambda: timed(lambda: peer(ids))
    }


def greedy(theirs: PreTrainedModel, ids: Tensor) -> tuple[list[int], float]:
    """Returns the next NEW ids of transformers and the seconds for all but the first.

    It is a bare loop, which is faster here than generate().
    """
    with torch.inference_mode():
        cache = DynamicCache(config=theirs.config)
        generated = []
        began = 0.0
        for _ in range(NEW):
            logits = theirs(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            generated.append(int(ids))
            began = began or time.perf_counter()
        return generated, time.perf_counter() - began


def own_greedy(ours: LanguageModel, prompt: list[int]) -> tuple[list[int], float]:
    """Returns the same for our own loop."""
    generated = []
    began = 0.0
    for (token,) in decode(ours, [prompt], max_new_tokens=NEW):
        generated.append(token)
        began = began or time.perf_counter()
    return generated, time.perf_counter() - began


@functools.lru_cache(maxsize=1)
def llamacpp(ours: LanguageModel) -> Callable[[list[int], int], tuple[list[int], float]] | None:
    """Returns llama.cpp's greedy decoding of our weights, whose first ids must equal ours.

    Where llama.cpp is not installed it prints a line and returns None.
    """
    try:
        import gguf_export
    except ImportError as error:
        print(f"no figures for llama.cpp: {error}; pip install gguf xllamacpp", file=sys.stderr)
        return None
    prompt = torch.randint(0, ours.config.vocab_size, (60,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        gguf_export.export(ours, Path(folder) / "model.gguf")
        decode = gguf_export.greedy(Path(folder) / "model.gguf", torch.get_num_threads())
        assert decode(prompt, 16)[0] == own_greedy(ours, prompt)[0][:16]
    return decode


def decoding(
    ours: LanguageModel, theirs: PreTrainedModel, length: int
) -> tuple[Timed, dict[str, Timed]]:
    Step.build()
    ids = agreed(
        ours.config.vocab_size,
        length,
        lambda ids: own_greedy(ours, ids[0].tolist())[0] == greedy(theirs, ids)[0],
    )
    prompt = ids[0].tolist()
    peers = {"transformers": lambda: greedy(theirs, ids)[1]}
    other = llamacpp(ours) if ours.config == CONFIG else None
    if other is not None:
        peers["llamacpp"] = lambda: other(prompt, NEW)[1]
    return (lambda: own_greedy(ours, prompt)[1]), peers


def training(
    ours: LanguageModel, theirs: PreTrainedModel, kind: str
) -> tuple[Timed, dict[str, Timed]]:
    """Returns steps of copies of the models, so that the models keep their weights."""
    text = torch.randint(0, ours.config.vocab_size, (BATCH, TIME + 1))
    ids = text[:, :-1].contiguous()
    labels = text[:, 1:].contiguous()
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    one_forward, peer = (copy.deepcopy(model).to(dtype).train() for model in (ours, theirs))
    # transformers does not train the indexer; ours does in training mode alone.
    one_forward.eval()
    losses = {
        "ours": lambda: one_forward.loss(ids, labels).total,
        "transformers": lambda: peer(ids, labels=labels, shift_labels=labels, use_cache=False).loss,
    }

    def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Timed:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return lambda: timed(step)

    with torch.no_grad():
        torch.testing.assert_close(
            *(loss().float() for loss in losses.values()), rtol=1e-2, atol=1e-3
        )
    return stepper(one_forward, losses["ours"]), {
        "transformers": stepper(peer, losses["transformers"])
    }


def main() -> None:
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=MODELS, default="deepseek-v3")
    parser.add_argument("--only", nargs="*", help="prefill_2048, decode_2048, train_float32 ...")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, cls, contexts = MODELS[options.model]
    names = [f"{kind}_{length}" for kind in ("prefill", "decode") for length in contexts]
    names += [f"train_{kind}" for kind in ("float32", "bfloat16", "autocast")]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pair(Path(folder) / "model", config, cls)
        made = {"prefill": prefill, "decode": decoding, "train": training}
        results: dict[str, float] = {}
        for name in options.only or names:
            kind, size = name.split("_")
            one_forward, peers = made[kind](ours, theirs, int(size) if size.isdigit() else size)
            taken = compare(one_forward, peers, options.rounds)
            results[name] = taken["transformers"]
            if "llamacpp" in taken:
                results[f"{name}_llamacpp"] = taken["llamacpp"]
            if not options.json:
                least = ", ".join(
                    f"{key} {value:.1f}" for key, value in taken.items() if key.endswith(" ms")
                )
                ratios = "".join(f"{taken[peer]:6.2f} x {peer}" for peer in peers)
                print(f"{name:16}{ratios}   (least: {least})", flush=True)
    if options.json:
        print(json.dumps(results | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
