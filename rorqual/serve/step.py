"""Computes the logits of the next token with the fastest decoding step that fits the model.

    reference   the model itself: any model, any batch
    decode_step kernels.step, compiled: any attention, dense or MoE, one residual stream or several,
                Engram in any blocks; at most BATCH sequences of any lengths without documents;
                float32 on the CPU, without hooks, adapters or replaced modules

Both leave the same cache, so that either can continue after the other. Engram is computed by its
module between two compiled calls, wherever its table is, and so is any attention but MLA.
"""

import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual import kernels, runtime
from rorqual.layers.attention import MLA
from rorqual.layers.cache import Cache
from rorqual.layers.experts import Experts
from rorqual.layers.feed_forward import SwiGLU
from rorqual.layers.hyper import Connection, Manifold, Residual, StreamReduction
from rorqual.layers.moe import MoE
from rorqual.layers.norm import RMSNorm
from rorqual.layers.router import Router
from rorqual.model import Block, LanguageModel
from rorqual.model_config import ROUTER_SCORES, HyperConfig

# The module types that the compiled step implements; any other may be an adapter.
COMPILED_TYPES = (
    nn.Linear, nn.Embedding, RMSNorm, SwiGLU, MLA, Router, Experts, MoE, Residual, Connection,
    Manifold, StreamReduction, Block,
)  # fmt: skip
BUILD_SECONDS = 300.0  # how long a server waits for the step to be compiled
BATCH = 32  # sequences; with more, products of large matrices are faster module by module

# The class of the compiled step, where it can run; the model itself decodes where it cannot.
STEP = kernels.choice("decode_step", __name__, numba="rorqual.kernels.step:Step")


class Decoder:
    """Computes the logits of the next token of every sequence, and extends the cache.

    It is for one generation or one server: weights that are changed in place take effect, weights
    that are replaced do not.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._fits = fits(model)
        # Made at the first step that it can run.
        self.compiled: _Compiled | None = None

    def wait_until_built(self) -> None:
        """Waits until the machine code of the compiled step exists, where the step fits.

        Without a folder to keep it in, or after a compilation that failed, there is nothing to wait
        for.
        """
        step = self._step()
        if step is not None:
            wait_until_built(step)

    def _step(self) -> Any:
        """Returns the class of the compiled step; None where it does not fit the model."""
        return STEP.choose(self.model.embed.weight.detach()) if self._fits else None

    def __call__(self, ids: Int[Tensor, "B 1"], cache: Cache) -> Float[Tensor, "B V"]:
        """Reads the last id of each sequence, in the fastest way that fits."""
        if self.compiled is None:
            step = self._step()
            if step is not None and built(step):
                self.compiled = _Compiled(step, self.model)
        takes = len(ids) <= BATCH and not cache.past.named
        takes = takes and not self.model.cache_is_outdated(cache, ids)
        if self.compiled is None or not takes:
            return self.model.logits(self.model.hidden(ids, cache=cache)[0])[:, 0]
        # Modules between the compiled calls have use for the pool.
        with runtime.one_thread() if self.compiled.attends else nullcontext():
            return self.compiled(ids, cache)


def built(step: Any) -> bool:
    """Returns whether the step's machine code exists; if not, starts its compilation.

    The compilation serves later generations. It runs in a process of its own, since a compiling and
    a decoding thread would compete for the interpreter.
    """
    if step.is_cached():
        return True
    start_build(step)
    return False


def wait_until_built(step: Any) -> None:
    """Waits until the step's machine code exists, or no longer can."""
    if built(step):
        return
    process = start_build(step)
    if process is None:
        return
    runtime.log("waiting for the decoding step to be compiled")
    end = time.monotonic() + BUILD_SECONDS
    with suppress(subprocess.TimeoutExpired):
        process.wait(BUILD_SECONDS)
    # It ends at once, without an error, where another process compiles already.
    while process.poll() == 0 and not step.is_cached() and time.monotonic() < end:
        time.sleep(0.2)
    if not step.is_cached():
        runtime.log("the decoding step was not compiled: models decode module by module", "yellow")


@functools.lru_cache(maxsize=1)
def start_build(step: Any) -> subprocess.Popen | None:
    """Starts the compilation once a process, without waiting for it."""
    if not step.keepable():
        runtime.log(
            "models decode module by module: there is nowhere to keep a compiled step "
            "(set NUMBA_CACHE_DIR)",
            "yellow",
        )
        return None
    runtime.log(
        "compiling the decoding step (some 20 s of a core, once an installation); "
        "until then models decode without it"
    )
    code = (
        "import os; getattr(os, 'nice', int)(10); "
        f"from {step.__module__} import {step.__name__} as step; step.keep()"
    )
    quiet = subprocess.DEVNULL
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        stdin=quiet,
        stdout=quiet,
        stderr=quiet,
        start_new_session=True,
    )


def fits(model: LanguageModel) -> bool:
    """Returns whether the compiled step computes what this model does."""
    c = model.config
    if model.training or c.rope.varies or c.rope.query_scale is not None:
        return False
    if c.moe is not None and (
        c.moe.router.adaptive_mass is not None
        or c.moe.router.image_ids
        or c.moe.norm_eps is not None
        or c.moe.shared_gate
    ):
        return False
    hyper = c.hyper
    if hyper is not None and (hyper.kind not in ("mhc", "single_pass") or hyper.mix != "sinkhorn"):
        return False
    compiled: list[nn.Module] = [model.embed, model.norm, model.head]
    compiled += [] if model.reduction is None else [model.reduction]
    outside = ("engram",) if _attends(model) else ("engram", "attention")
    for block in model.blocks:
        children = [child for name, child in block.named_children() if name not in outside]
        compiled += [block, *(module for child in children for module in child.modules())]
    values = [value for module in compiled for value in module.parameters(recurse=False)]
    return all(
        type(module) in COMPILED_TYPES
        and module._forward_hooks == module._forward_pre_hooks == {}
        and "forward" not in module.__dict__
        and getattr(module, "exchange", None) is None
        for module in compiled
    ) and all(p.dtype == torch.float32 and p.is_contiguous() and p.is_cpu for p in values)


def _attends(model: LanguageModel) -> bool:
    """Returns whether the compiled step computes the model's attention, too."""
    mla = model.config.mla
    plain = all(type(cast(Block, block).attention) is MLA for block in model.blocks)
    return plain and mla is not None and not mla.bias


class _Compiled:
    """Runs kernels.step.Step, the class `step`, which needs numba and is imported when it runs."""

    def __init__(self, step: Any, model: LanguageModel) -> None:
        self.model = model
        self.embed = model.embed.weight.detach()
        # Referenced, since the step reads their memory.
        self.weights = [value.detach() for value in (*model.parameters(), *model.buffers())]
        self.blocks = [cast(Block, block) for block in model.blocks]
        self.attends = _attends(model)
        places = [_places(block, self.attends, step.PLACES) for block in self.blocks]
        self.places = np.array(places, np.int64)
        widths = np.array([_width(block) for block in self.blocks], np.int64)
        ends = np.array(_ends(model, step.ENDS), np.int64)
        self.latent = step.PLACES.index("latent")
        # The parts of blocks before which a module runs: Engram comes before the rest of its block,
        # an attention of another kind before the feed-forward.
        edges = {2 * n for n, block in enumerate(self.blocks) if block.engram is not None}
        if not self.attends:
            edges.update(range(1, 2 * len(self.blocks), 2))
        self.edges = sorted(edges | {0, 2 * len(self.blocks)})
        self.step = step(
            self.places, widths, ends, sizes(model, step.SIZES), torch.get_num_threads()
        )

    def __call__(self, ids: Int[Tensor, "B 1"], cache: Cache) -> Float[Tensor, "B V"]:
        model = self.model
        batch = len(ids)
        streams = self.model.config.streams
        lengths = np.array(cache.past.lengths, np.int64)
        ctx, pending = model.prepare(ids, cache)
        pages = self._pages(cache, lengths) if self.attends else np.empty((batch, 0), np.int64)
        x = self.embed[ids[:, 0]][:, None].repeat(1, streams, 1)  # [B, S, D]
        # single_pass reads stream 0 first.
        pre = np.zeros((batch, streams), np.float32)
        pre[:, 0] = 1
        assert ctx.cos is not None and ctx.sin is not None
        cos, sin = (table[:, 0].expand(batch, -1).contiguous() for table in (ctx.cos, ctx.sin))
        rest = pre, lengths, pages, cos.numpy(), sin.numpy()
        tokens = self.step.TOKENS(ids[:, 0].contiguous().numpy(), x.numpy(), *rest)
        logits = np.empty((batch, self.step.sizes.vocab_size), np.float32)
        for first, last in pairwise(self.edges):
            block = self.blocks[first // 2]
            index = first // 2
            of_block = ctx.for_block(cache.layers[index], pending.get(index))
            if first % 2:
                work = self.step.work
                attended = block.attention(torch.from_numpy(work.hidden)[:, None], of_block)
                torch.from_numpy(work.delta).copy_(attended.out[:, 0])
                if attended.shared is not None:
                    ctx = replace(ctx, shared=attended.shared)
            elif block.engram is not None:
                x += block.engram(x[:, None], of_block)[:, 0]
            ends = last == self.edges[-1]
            self.step(tokens, first, last, logits if ends else logits[:0])
        return torch.from_numpy(logits)

    def _pages(self, cache: Cache, lengths: np.ndarray) -> np.ndarray:
        """Reserves space for one more latent; returns where each sequence's pages start."""
        longest = int(lengths.max()) + 1
        capacity = 0
        for layer, block_cache in enumerate(cache.layers):
            latent = block_cache.attention.latent
            buffer = latent.reserve(latent.stored, longest)
            self.places[layer, self.latent] = buffer.data_ptr()
            capacity = buffer.shape[1]
        page = self.step.PAGE
        return np.arange(len(lengths))[:, None] * capacity + np.arange(0, longest, page)[None]


def _ends(model: LanguageModel, names: Sequence[str]) -> list[int]:
    """Returns the addresses of the weights after the last block; 0 for a missing one."""
    weights: dict[str, Any] = {"norm": model.norm.weight, "head": model.head.weight}
    reduction: nn.Module | None = model.reduction
    if reduction is not None:
        weights.update(reduction.named_parameters())
    return [weights[name].data_ptr() if name in weights else 0 for name in names]


def _of_attention(attention: MLA) -> dict[str, Tensor | None]:
    """Returns the weights of a compiled attention."""
    lora = attention.config.q_lora_rank is not None
    return {
        "q_a": attention.q_a_proj.weight if lora else None,
        "q_norm": attention.q_a_layernorm.weight if lora else None,
        "q_b": attention.q_b_proj.weight if lora else attention.q_proj.weight,
        "kv_a": attention.kv_a_proj_with_mqa.weight,
        "kv_norm": attention.kv_a_layernorm.weight,
        "kv_b": attention.kv_b_proj.weight,
        "o": attention.o_proj.weight,
    }


def _places(block: Block, attends: bool, names: Sequence[str]) -> list[int]:
    """Returns the addresses of a block's weights in the order of `names`; 0 for a missing one."""
    attention = block.attention
    ffn = block.ffn
    plain = ffn.shared if isinstance(ffn, MoE) else ffn
    weights: dict[str, Tensor | None] = {
        "attention_norm": cast(RMSNorm, block.attention_norm).weight,
        "ffn_norm": cast(RMSNorm, block.ffn_norm).weight,
    }
    if attends:
        weights |= _of_attention(cast(MLA, attention))
    if plain is not None:
        weights |= {name: getattr(plain, f"{name}_proj").weight for name in ("gate", "up", "down")}
    if isinstance(ffn, MoE):
        weights |= {"router": ffn.router.weight, "bias": ffn.router.e_score_correction_bias}
        weights |= {"table": ffn.router.table}
        weights |= {"gate_up": ffn.experts.gate_up, "experts_down": ffn.experts.down}
    for site in ("attention", "ffn"):
        mapping = getattr(block, f"{site}_residual").named_parameters()
        weights |= {f"{site}_{name.removeprefix('mixer.')}": value for name, value in mapping}
    pointers = (weights.get(name) for name in names)
    return [0 if weight is None else weight.data_ptr() for weight in pointers]


def _width(block: Block) -> int:
    """Returns the width of the SwiGLU that is applied to every token."""
    plain = block.ffn.shared if isinstance(block.ffn, MoE) else block.ffn
    return 0 if plain is None else plain.gate_proj.weight.shape[0]


def sizes(model: LanguageModel, make: Callable[..., Any]) -> Any:
    """Makes the compiled step's Sizes of the sizes and options of a model."""
    c = model.config
    moe = model.config.moe
    # An attention that is not compiled has no sizes.
    mla = c.mla if _attends(model) else None
    router = moe.router if moe is not None else None
    hyper = c.hyper or HyperConfig(streams=1)
    return make(
        dim=c.dim,
        vocab_size=c.vocab_size,
        heads=mla.heads if mla is not None else 0,
        query_rank=(mla.q_lora_rank or 0) if mla is not None else 0,
        rank=mla.kv_lora_rank if mla is not None else 0,
        nope=mla.nope_dim if mla is not None else 0,
        rope=mla.rope_dim if mla is not None else 0,
        value=mla.value_dim if mla is not None else 0,
        interleaved=c.rope.interleaved,
        scale=cast(MLA, model.blocks[0].attention).scale if mla is not None else 1.0,
        eps=c.eps,
        latent_eps=mla.eps if mla is not None else 0.0,
        experts=moe.routed if moe is not None else 0,
        active=moe.active if moe is not None else 0,
        width=moe.width if moe is not None else 0,
        limit=math.inf if moe is None or moe.swiglu_limit is None else moe.swiglu_limit,
        score=ROUTER_SCORES.index(router.score) if router is not None else 0,
        groups=router.groups if router is not None else 1,
        groups_kept=router.groups_kept if router is not None else 1,
        by_two=router is not None and router.group_score == "top2",
        renormalise=router is not None and router.renormalise,
        weight_scale=router.scale if router is not None else 1.0,
        streams=hyper.streams,
        single_pass=hyper.kind == "single_pass",
        iterations=hyper.iterations,
        hyper_eps=hyper.eps,
        hyper_norm_eps=hyper.norm_eps,
    )
