"""ModelConfig -> parameters, FLOPs and cache bytes, counted, so that they can be held against the published figures.

activated = total - resting experts - memory + recalled rows - input embedding
FLOPs a token = 2 (activated matrices + attention over context / 2 keys + mixing of the streams)      forward
"""

from typing import NamedTuple

import torch

from rorqual.model import LanguageModel, ModelConfig


class Costs(NamedTuple):
    """What a model weighs and takes. Parameters are counted, FLOPs are 2 for a multiply and add, forward only."""

    total: int  # with router biases, without MTP's modules
    activated: int  # all a token goes through but the input embedding
    activated_with_embedding: int  # the published "activated" of most reports: both embeddings
    memory: int  # rows of Engram's tables, in parameters; never activated but for the few recalled
    mtp: int  # MTP's modules
    mtp_activated: int  # a token's way through them, the shared head included
    flops_per_token: int  # forward, attention to `context / 2` keys on average
    cache_bytes_per_token: int  # attention's, in bfloat16


def costs(config: ModelConfig, context: int = 4096) -> Costs:
    """Counted on a model without storage (meta device), so that the figures are the model's own."""
    with torch.device("meta"):
        model = LanguageModel(config, seed=None)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    mtp_biases = sum(b.numel() for name, b in model.mtp.named_buffers() if name.endswith("e_score_correction_bias"))
    mtp = sum(n for name, n in sizes.items() if name.startswith("mtp.")) + mtp_biases
    memory = sum(n for name, n in sizes.items() if name.startswith("tables."))
    total = sum(sizes.values()) + biases - mtp
    expert = 3 * config.dim * config.moe.width if config.moe is not None else 0
    resting = (config.moe.routed - config.moe.active) * expert if config.moe is not None else 0
    blocks_with_experts = sum(config.has_experts(i) for i in range(config.layers))
    recalled = len(config.engram.layers) * config.engram.memory_width if config.engram is not None else 0
    embedding = config.vocabulary * config.dim
    with_embedding = total - blocks_with_experts * resting - memory + recalled
    activated = with_embedding - (0 if config.tied else embedding)
    has_moe = config.moe is not None
    return Costs(
        total=total,
        activated=activated,
        activated_with_embedding=with_embedding,
        memory=memory,
        mtp=mtp,
        mtp_activated=mtp - len(model.mtp) * resting * has_moe + (embedding if len(model.mtp) else 0),
        flops_per_token=_flops(config, model, context, blocks_with_experts * resting),
        cache_bytes_per_token=2 * config.layers * _cached_values(config),
    )


def _flops(config: ModelConfig, model: LanguageModel, context: int, resting: int) -> int:
    """2 a weight a token goes through, 2 a query-key and probability-value product, the streams' mixing."""
    skipped = ("tables.", "mtp.", "embed.")
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(skipped))
    weights += config.vocabulary * config.dim if config.tied else 0
    attended = _attended(config) * context // 2
    streams = config.streams
    mixing = 2 * config.dim * streams * (streams + 2) if config.hyper is not None else 0
    return 2 * (weights - resting + config.layers * (attended + mixing))


def _attended(config: ModelConfig) -> int:
    """Products of a query with one key, and of its probability with one value, over all heads."""
    if config.mla is not None:
        return config.mla.heads * (config.mla.nope_dim + config.mla.rope_dim + config.mla.value_dim)
    assert config.gqa is not None
    return config.gqa.heads * (config.gqa.head_dim + (config.gqa.value_dim or config.gqa.head_dim))


def _cached_values(config: ModelConfig) -> int:
    if config.mla is not None:
        return config.mla.kv_lora_rank + config.mla.rope_dim
    assert config.gqa is not None
    return config.gqa.kv_heads * (config.gqa.head_dim + (config.gqa.value_dim or config.gqa.head_dim))
