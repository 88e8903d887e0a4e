"""Computes the logits of the next token with the fastest decoding step that fits the model.

    reference   the model itself: any model, any batch
    decode_step kernels.step, one compiled call: a DeepSeek model (MLA; dense or MoE), one sequence
                without padding or documents, float32 on the CPU, without hooks, adapters or
                replaced modules

Both leave the same cache, so that either can continue after the other.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual import kernels
from rorqual.layers.attention import MLA
from rorqual.layers.basics import RMSNorm, SwiGLU, rope_tables
from rorqual.layers.cache import Appended, Cache
from rorqual.layers.experts import Experts
from rorqual.layers.hyper import Residual
from rorqual.layers.moe import MoE
from rorqual.layers.router import Router
from rorqual.model import Block, LanguageModel
from rorqual.model_config import ROUTER_SCORES
from rorqual.runtime import log

# The module types that the compiled step implements; any other may be an adapter.
KNOWN = (nn.Linear, nn.Embedding, RMSNorm, SwiGLU, MLA, Router, Experts, MoE, Residual, Block)
TURNED = 256  # positions whose rotations are computed at once

# The class of the compiled step, where it can run; the model itself decodes where it cannot.
STEP = kernels.choice("decode_step", __name__, numba="rorqual.kernels.step:Step")

Decoder = Callable[[Int[Tensor, "B 1"]], Float[Tensor, "B V"]]


def decoder(model: LanguageModel, cache: Cache, batch_size: int) -> Decoder:
    """Returns a function from the last id of each of `batch_size` sequences to their logits.

    Each call extends the cache. The function is for one generation: weights that are changed in
    place take effect, weights that are replaced do not.
    """

    def reference(ids: Tensor) -> Tensor:
        return model.logits(model.hidden(ids, cache=cache)[0])[:, 0]

    step = STEP.choose(model.embed.weight.detach())
    if step is None or batch_size != 1 or not fits(model) or cache.past.named:
        return reference
    return _Compiled(step, model, cache) if built(step) else reference


def built(step: Any) -> bool:
    """Returns whether the step's machine code exists; if not, starts its compilation.

    The compilation serves later generations. It runs in a process of its own, since a compiling and
    a decoding thread would compete for the interpreter.
    """
    if step.is_cached():
        return True
    _building(step)
    return False


@functools.lru_cache(maxsize=1)
def _building(step: Any) -> subprocess.Popen | None:
    """Starts the compilation once a process, without waiting for it."""
    if not step.keepable():
        log(
            "models decode module by module: there is nowhere to keep a compiled step "
            "(set NUMBA_CACHE_DIR)",
            "yellow",
        )
        return None
    log(
        "compiling the decoding step (some 20 s of a core, once an installation); "
        "until then models decode without it"
    )
    code = (
        "import os; getattr(os, 'nice', int)(10); "
        f"from {step.__module__} import {step.__name__} as step; step.keep()"
    )
    quiet, paths = subprocess.DEVNULL, os.pathsep.join(path or os.getcwd() for path in sys.path)
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
    if (
        c.mla is None
        or c.mla.bias
        or model.training
        or (c.dsa, c.engram, c.hyper) != (None, None, None)
    ):
        return False
    if c.rope.varies or c.rope.query_scale is not None:
        return False
    if c.moe is not None and (
        c.moe.router.adaptive_mass is not None
        or c.moe.router.token_id_layers
        or c.moe.swiglu_limit is not None
        or c.moe.norm_eps is not None
    ):
        return False
    modules = [
        model.embed,
        model.norm,
        model.head,
        *(module for block in model.blocks for module in block.modules()),
    ]
    return all(
        type(module) in KNOWN
        and module._forward_hooks == module._forward_pre_hooks == {}
        and "forward" not in module.__dict__
        and getattr(module, "exchange", None) is None
        for module in modules
    ) and all(
        p.dtype == torch.float32 and p.is_contiguous() and p.is_cpu for p in model.parameters()
    )


class _Compiled:
    """Runs kernels.step.Step, the class `step`, which needs numba and is imported when it runs."""

    def __init__(self, step: Any, model: LanguageModel, cache: Cache) -> None:
        self.model, self.cache, self.turned = model, cache, -1
        self.embed = model.embed.weight.detach()
        # Referenced, since the step reads their memory.
        self.weights = [value.detach() for value in (*model.parameters(), *model.buffers())]
        self.latents = [
            cast(Appended, layer.attention.latent) for layer in cast(Iterable, cache.layers)
        ]
        blocks = [cast(Block, block) for block in model.blocks]
        self.places = np.array([_places(block, step.PLACES) for block in blocks], np.int64)
        widths = np.array([_width(block) for block in blocks], np.int64)
        ends = np.array([model.norm.weight.data_ptr(), model.head.weight.data_ptr()], np.int64)
        self.latent = step.PLACES.index("latent")
        ours = sizes(model, step.SIZES)
        self.step = step(self.places, widths, ends, ours, torch.get_num_threads())

    def __call__(self, ids: Int[Tensor, "1 1"]) -> Float[Tensor, "1 V"]:
        length = self.cache.past.length
        for layer, latent in enumerate(self.latents):
            assert latent.buffer is not None
            buffer = latent.reserve(latent.buffer, length + 1)
            self.places[layer, self.latent] = buffer.data_ptr()
        self.cache.past.append([1])
        cos, sin = self._rotation(length)
        embedded = self.embed[ids[0, 0]].numpy().copy()
        return torch.from_numpy(self.step(embedded, length, cos, sin))[None]

    def _rotation(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        index = position % TURNED
        if position - index != self.turned:
            self.turned = position - index
            positions = torch.arange(self.turned, self.turned + TURNED)[None]
            tables = rope_tables(self.model.config.rope, self.model.rope_dim, positions)
            self.cos, self.sin = (table[0].numpy() for table in tables)
        return self.cos[index], self.sin[index]


def _places(block: Block, names: Sequence[str]) -> list[int]:
    """Returns the addresses of a block's weights in the order of `names`; 0 for a missing one."""
    attention, ffn = cast(MLA, block.attention), block.ffn
    plain = ffn.shared if isinstance(ffn, MoE) else ffn
    lora = attention.config.q_lora_rank is not None
    weights: dict[str, Tensor | None] = {
        "attention_norm": block.attention_norm.weight,
        "q_a": attention.q_a_proj.weight if lora else None,
        "q_norm": attention.q_a_layernorm.weight if lora else None,
        "q_b": attention.q_b_proj.weight if lora else attention.q_proj.weight,
        "kv_a": attention.kv_a_proj_with_mqa.weight,
        "kv_norm": attention.kv_a_layernorm.weight,
        "kv_b": attention.kv_b_proj.weight,
        "o": attention.o_proj.weight,
        "ffn_norm": block.ffn_norm.weight,
    }
    if plain is not None:
        weights |= {name: getattr(plain, f"{name}_proj").weight for name in ("gate", "up", "down")}
    if isinstance(ffn, MoE):
        weights |= {"router": ffn.router.weight, "bias": ffn.router.e_score_correction_bias}
        weights |= {"gate_up": ffn.experts.gate_up, "experts_down": ffn.experts.down}
    pointers = (weights.get(name) for name in names)
    return [0 if weight is None else weight.data_ptr() for weight in pointers]


def _width(block: Block) -> int:
    """Returns the width of the SwiGLU that is applied to every token."""
    plain = block.ffn.shared if isinstance(block.ffn, MoE) else block.ffn
    return 0 if plain is None else plain.gate_proj.weight.shape[0]


def sizes(model: LanguageModel, make: Callable[..., Any]) -> Any:
    """Makes the compiled step's Sizes of the sizes and options of a model."""
    c, mla, moe, attention = (
        model.config,
        model.config.mla,
        model.config.moe,
        model.blocks[0].attention,
    )
    assert mla is not None and isinstance(attention, MLA)
    router = moe.router if moe is not None else None
    return make(
        dim=c.dim,
        vocab_size=c.vocab_size,
        heads=mla.heads,
        query_rank=mla.q_lora_rank or 0,
        rank=mla.kv_lora_rank,
        nope=mla.nope_dim,
        rope=mla.rope_dim,
        value=mla.value_dim,
        interleaved=c.rope.interleaved,
        scale=attention.scale,
        eps=c.eps,
        latent_eps=mla.eps,
        experts=moe.routed if moe is not None else 0,
        active=moe.active if moe is not None else 0,
        width=moe.width if moe is not None else 0,
        score=ROUTER_SCORES.index(router.score) if router is not None else 0,
        groups=router.groups if router is not None else 1,
        groups_kept=router.groups_kept if router is not None else 1,
        by_two=router is not None and router.group_score == "top2",
        renormalise=router is not None and router.renormalise,
        weight_scale=router.scale if router is not None else 1.0,
    )
