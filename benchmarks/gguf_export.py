"""Exports a DeepSeek model of ours to a .gguf file, which llama.cpp decodes for comparison.

The architecture is deepseek2 in float32. The cache has one key head of kv_lora_rank + rope values;
kv_b is split into the part for the query and the part that follows the sum. llama.cpp comes with
`pip install xllamacpp`, the writer with `pip install gguf`.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import gguf
import numpy as np
import xllamacpp
from torch import Tensor

from rorqual.layers.attention import MLA
from rorqual.layers.moe import MoE
from rorqual.model import Block, LanguageModel, ModelConfig

GATING = {
    "softmax": gguf.ExpertGatingFuncType.SOFTMAX,
    "sigmoid": gguf.ExpertGatingFuncType.SIGMOID,
}


def describe(writer: gguf.GGUFWriter, c: ModelConfig, context: int) -> None:
    """Writes the model's sizes; ValueError for models that cannot be exported."""
    a = c.mla
    m = c.moe
    plain = (
        c.rope.interleaved
        and c.rope.yarn is None
        and a is not None
        and a.eps == c.eps
        and not a.bias
    )
    if not plain or m is None or m.router.groups > 1 or m.router.score not in GATING:
        raise ValueError(
            "gguf: expected MLA and experts without groups, YaRN or biases, "
            "pairs interleaved, one eps"
        )
    description = {
        "context_length": context, "embedding_length": c.dim, "block_count": c.layers,
        "layer_norm_rms_eps": c.eps,
        "feed_forward_length": c.dense_width, "leading_dense_block_count": m.first_dense,
        "rope_freq_base": c.rope.base, "rope_dimension_count": a.rope_dim, "head_count": a.heads,
        "head_count_kv": 1,
        "key_length": a.kv_lora_rank + a.rope_dim, "value_length": a.kv_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "key_length_mla": a.nope_dim + a.rope_dim, "value_length_mla": a.value_dim,
        "q_lora_rank": a.q_lora_rank,
        "expert_count": m.routed, "expert_used_count": m.active, "expert_shared_count": m.shared,
        "expert_feed_forward_length": m.width, "expert_gating_func": GATING[m.router.score],
        "expert_weights_scale": m.router.scale, "expert_weights_norm": m.router.renormalise,
    }  # fmt: skip
    for name, value in description.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def words(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Writes a placeholder vocabulary, which must exist although only ids are used."""
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(vocab_size)])
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types([gguf.TokenType.UNKNOWN, *[gguf.TokenType.NORMAL] * (vocab_size - 1)])
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def tensors(block: Block) -> dict[str, Tensor]:
    """Returns one block's tensors, by llama.cpp's names."""
    attention = cast(MLA, block.attention)
    ffn = block.ffn
    c = attention.config
    up, down = attention.kv_b_proj.weight.unflatten(0, (c.heads, -1)).split(
        [c.nope_dim, c.value_dim], dim=1
    )
    results = {
        "attn_norm.weight": block.attention_norm.weight,
        "attn_kv_a_mqa.weight": attention.kv_a_proj_with_mqa.weight,
        "attn_kv_a_norm.weight": attention.kv_a_layernorm.weight,
        "attn_k_b.weight": up.transpose(1, 2),
        "attn_v_b.weight": down,
        "attn_output.weight": attention.o_proj.weight,
        "ffn_norm.weight": block.ffn_norm.weight,
    }
    if c.q_lora_rank is None:
        results["attn_q.weight"] = attention.q_proj.weight
    else:
        results["attn_q_a.weight"] = attention.q_a_proj.weight
        results["attn_q_a_norm.weight"] = attention.q_a_layernorm.weight
        results["attn_q_b.weight"] = attention.q_b_proj.weight
    plain, suffix = (ffn.shared, "_shexp") if isinstance(ffn, MoE) else (ffn, "")
    if plain is not None:
        results |= {
            f"ffn_{name}{suffix}.weight": getattr(plain, f"{name}_proj").weight
            for name in ("gate", "up", "down")
        }
    if isinstance(ffn, MoE):
        gate, inner = ffn.experts.gate_up.transpose(1, 2).chunk(2, dim=1)  # [E, W, D]
        results |= {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": inner}
        results |= {
            "ffn_down_exps.weight": ffn.experts.down.transpose(1, 2),
            "ffn_gate_inp.weight": ffn.router.weight,
        }
        if ffn.router.e_score_correction_bias is not None:
            results["exp_probs_b.bias"] = ffn.router.e_score_correction_bias
    return results


def export(model: LanguageModel, path: str | Path, context: int = 4096) -> None:
    """Writes the model; llama.cpp then computes the same next-token logits."""
    writer = gguf.GGUFWriter(str(path), "deepseek2")
    describe(writer, model.config, context)
    words(writer, model.config.vocab_size)
    named = {"token_embd.weight": model.embed.weight, "output_norm.weight": model.norm.weight}
    named["output.weight"] = model.head.weight
    for index, block in enumerate(model.blocks):
        named |= {
            f"blk.{index}.{name}": tensor for name, tensor in tensors(cast(Block, block)).items()
        }
    for name, tensor in named.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().float().numpy()))
    for piece in (
        "write_header_to_file",
        "write_kv_data_to_file",
        "write_tensors_to_file",
        "close",
    ):
        getattr(writer, piece)()


def greedy(
    path: str | Path, threads: int, context: int = 4096
) -> Callable[[list[int], int], tuple[list[int], float]]:
    """Returns a function that decodes greedily with llama.cpp from the file.

    The function takes a prompt and a number of tokens. It returns the ids that follow, and
    llama.cpp's own seconds for all but the first. Its defaults hold, among them a cache in float16.
    """
    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx = context
    options.n_parallel = 1
    options.verbosity = 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(options)

    def decode(prompt: list[int], count: int) -> tuple[list[int], float]:
        asked = {
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "samplers": ["temperature"],
        }
        reply = server.handle_completions(asked | {"ignore_eos": True, "cache_prompt": False})
        ids = [int(number) for number in re.findall(r"<(\d+)>", reply["choices"][0]["text"])]
        assert len(ids) == count == reply["timings"]["predicted_n"]
        return ids, reply["timings"]["predicted_ms"] / 1e3

    return decode
