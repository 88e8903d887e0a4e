"""Builds random models of DeepSeekMoE-16B: Llama's attention with DeepSeek V2's experts.

The published model is code in its folder; transformers has both of its parts.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Moe,
    DeepseekV2TopkRouter,
)

EXPERTS = "mlp.experts"


def deepseek(seed: int) -> LlamaConfig:
    """Draws a configuration; the fields of the experts are attributes of Llama's."""
    draw = random.Random(f"deepseek {seed}")
    groups = draw.choice([1, 2, 3])
    layers = draw.randint(1, 5)
    heads = groups * draw.choice([1, 2, 3])
    routed = draw.choice([2, 3, 8, 13])
    kind = draw.choice(["default", "default", "linear", "dynamic"])
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw.choice([1e4, 300.0])}
    if kind != "default":
        rope["factor"] = draw.choice([2.0, 3.5])
    return LlamaConfig(
        vocab_size=draw.choice([41, 97, 128]),
        hidden_size=heads * draw.choice([4, 6, 10]),
        intermediate_size=draw.choice([1, 24, 33]),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rms_norm_eps=draw.choice([1e-12, 1e-6, 1e-3]),
        attention_bias=draw.random() < 0.3,
        tie_word_embeddings=draw.random() < 0.3,
        rope_parameters=rope,
        max_position_embeddings=draw.choice([16, 256]) if kind == "dynamic" else 256,
        pad_token_id=draw.choice([None, None, 3]),
        bos_token_id=None,
        eos_token_id=None,
        n_routed_experts=routed,
        n_shared_experts=draw.choice([None, 1, 2]),
        num_experts_per_tok=draw.randint(1, min(6, routed)),
        moe_intermediate_size=draw.choice([1, 8, 15]),
        first_k_dense_replace=draw.randint(0, layers),
        moe_layer_freq=draw.choice([1, 1, 2]),
        norm_topk_prob=draw.random() < 0.5,
        scoring_func="softmax",
    )


class _Router(DeepseekV2TopkRouter):
    """V2's router, which renormalises the weights of several experts if it is told to."""

    renormalise = False

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, indices = super().forward(hidden_states)
        if self.renormalise and self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights, indices


def _experts(config: LlamaConfig) -> DeepseekV2Moe:
    experts = DeepseekV2Config(
        hidden_size=config.hidden_size,
        num_attention_heads=1,
        n_routed_experts=config.n_routed_experts,
        n_shared_experts=getattr(config, "n_shared_experts", None) or 0,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
    )
    block = DeepseekV2Moe(experts)
    block.gate = _Router(experts)
    block.gate.renormalise = config.norm_topk_prob
    return block


def build(config: LlamaConfig) -> LlamaForCausalLM:
    """Builds the model of a configuration."""
    model = LlamaForCausalLM(config)
    for index in range(config.first_k_dense_replace, config.num_hidden_layers):
        if index % config.moe_layer_freq == 0:
            model.model.layers[index].mlp = _experts(config)
    model.save_pretrained = lambda folder: save(model, Path(folder))
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Writes a folder under the published names, with a tensor for each expert."""
    folder.mkdir(parents=True, exist_ok=True)
    description = model.config.to_dict() | {"model_type": "deepseek"}
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        layer, of_experts, kind = name.partition(EXPERTS)
        if not of_experts:
            tensors[name] = value
            continue
        for expert, each in enumerate(value):
            parts = {"down_proj": each}
            if kind == ".gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), each.chunk(2), strict=True))
            for leaf, weight in parts.items():
                tensors[f"{layer}{EXPERTS}.{expert}.{leaf}.weight"] = weight
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    tensors = {name: value.contiguous().clone() for name, value in tensors.items() if value.numel()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def again(folder: Path) -> LlamaForCausalLM:
    """Loads an exported folder."""
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = build(LlamaConfig(**{k: v for k, v in description.items() if k != "model_type"}))
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer, of_experts, kind = name.partition(EXPERTS)
            if not of_experts:
                if parameter.numel():
                    parameter.copy_(tensors[name])
                continue
            parts = ("gate_proj", "up_proj") if kind == ".gate_up_proj" else ("down_proj",)
            for expert, target in enumerate(parameter):
                stored = [tensors[f"{layer}{EXPERTS}.{expert}.{leaf}.weight"] for leaf in parts]
                target.copy_(torch.cat(stored))
    return model


FAMILIES = {"deepseek": deepseek}
