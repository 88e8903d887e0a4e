"""Builds small DeepSeek-V4.1 models of random configurations, and their folders.

They are those of nemo-automodel, a development dependency that is installed without what it asks
for: its V4.1 model runs on a CPU with torch and transformers alone. Nothing here runs without it.
"""

import contextlib
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MISSING = "nemo-automodel is not installed: make venv installs it"
VOCAB_SIZE = 300


def is_installed() -> bool:
    return importlib.util.find_spec("nemo_automodel") is not None


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of bytes and of words in several spellings, 300 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["the", "The", "THE", "Ġthe", "Ġ", "ĠĠ", "é", "e", "Ċ", "cat", "Cat"]
    pieces = list(dict.fromkeys(["<bos>", "<eos>", "<pad>", *alphabet, *words]))
    pieces += [f"w{i}" for i in range(VOCAB_SIZE - len(pieces))]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def canonical_count() -> int:
    from nemo_automodel.components.models.deepseek_v41 import engram

    return engram._compressed_token_map(tokenizer())[1]


def _schedule(draw: random.Random, layers: int) -> dict[str, Any]:
    """Draws which layers compress, which select anew, and which keep what was selected."""
    ratios = []
    sources = []
    selecting = []
    ratio = 0
    for layer in range(layers):
        if draw.random() < 0.2 and layer < layers - 1:
            ratios.append(0)
            continue
        if ratio == 0 or draw.random() < 0.4:
            ratio = draw.choice([1, 1, 2, 2, 3, 4])
            sources.append(layer)
            selecting.append(layer)
        elif draw.random() < 0.5:
            selecting.append(layer)
        ratios.append(ratio)
    return {
        "compress_ratios": ratios,
        "kv_source_layer_ids": sources,
        "index_source_layer_ids": selecting,
        # Only the last source may select coarse blocks for those after it.
        "candidate_source_layer_id": sources[-1] if sources and draw.random() < 0.6 else -1,
    }


def text_config(seed: int) -> dict[str, Any]:
    """Draws the fields of a text_config."""
    draw = random.Random(seed)
    layers = draw.randint(1, 6)
    groups = draw.choice([1, 2, 3, 4])
    rope = draw.choice([2, 4, 8])
    width = draw.choice([8, 12, 20])
    experts = draw.randint(2, 8)
    orders = draw.randint(1, 4)
    heads = draw.randint(1, 3)
    schedule = _schedule(draw, layers)
    if draw.random() < 0.3:  # the schedule may name more layers than there are
        schedule["compress_ratios"] += [0] * draw.randint(1, 3)
    memory = sorted(draw.sample(range(layers), min(layers, draw.choice([0, 1, 2]))))
    yarn = {
        "rope_type": "yarn",
        "factor": draw.choice([1.0, 4, 16.0]),
        "beta_fast": draw.choice([32, 8]),
        "beta_slow": draw.choice([1, 2]),
        "original_max_position_embeddings": draw.choice([16, 64, 4096]),
    }
    fields = {
        "vocab_size": VOCAB_SIZE + draw.choice([0, 4]),
        "hidden_size": draw.choice([15, 16, 24, 36]),
        "moe_intermediate_size": draw.choice([1, 8, 12]),
        "num_hidden_layers": layers,
        "num_attention_heads": groups * draw.choice([1, 2, 3, 5]),
        "head_dim": max(width, rope),
        "qk_rope_head_dim": rope,
        "q_lora_rank": draw.choice([6, 16]),
        "o_lora_rank": draw.choice([4, 9]),
        "o_groups": groups,
        "swiglu_limit": draw.choice([0.0, 10.0, 0.3]),
        "rms_norm_eps": draw.choice([1e-20, 1e-6, 1e-3]),
        "rope_theta": draw.choice([10000.0, 300.0]),
        "rope_scaling": yarn,
        "n_routed_experts": experts,
        "num_experts_per_tok": draw.randint(1, experts),
        "norm_topk_prob": draw.random() < 0.8,
        "routed_scaling_factor": draw.choice([1.5, 1.0, 2.5]),
        "sliding_window": draw.choice([1, 2, 3, 8, 40, 128]),
        "compress_rope_theta": draw.choice([160000.0, 900.0]),
        "index_n_heads": draw.choice([1, 3, 4]),
        "index_head_dim": max(rope, draw.choice([8, 10])),
        "index_topk": draw.choice([1, 4, 7, 50]),
        "candidate_topk_blocks": draw.choice([1, 2, 5]),
        "candidate_block_size": draw.choice([1, 2, 3]),
        "hc_mult": draw.choice([1, 2, 3, 4]),
        "hc_sinkhorn_iters": draw.choice([1, 2, 20]),
        "engram_layer_ids": memory,
        "engram_max_ngram_size": orders + 1,
        "engram_vocab_size": draw.choice([50, 131]),
        "engram_n_heads": heads,
        "engram_head_dim": draw.choice([1, 4, 32]),
        "engram_pad_token_id": draw.choice([0, 2, 9]),
        "num_nextn_predict_layers": 0,
        "dtype": "float32",
    } | schedule
    if memory:
        fields["engram_compressed_vocab_size"] = canonical_count()
        rows = _rows(fields)
        fields["engram_num_embeddings"] = [n + draw.choice([0, 0, 3]) for n in rows]
    else:
        fields["engram_num_embeddings"] = []
    return fields


def _rows(fields: dict[str, Any]) -> list[int]:
    from rorqual.model_config import EngramConfig, row_totals

    orders = fields["engram_max_ngram_size"] - 1
    return list(
        row_totals(
            EngramConfig(
                layers=tuple(fields["engram_layer_ids"]),
                rows_per_head=(fields["engram_vocab_size"],) * orders,
                heads=fields["engram_n_heads"],
            )
        )
    )


def oracle_config(seed: int) -> dict[str, Any]:
    """Returns the fields of a config.json."""
    return {
        "text_config": text_config(seed),
        "vision_config": {"num_hidden_layers": 0},
        "dtype": "float32",
    }


@contextlib.contextmanager
def exact_caches() -> Iterator[None]:
    """Leaves cached values as they are, so that results can be compared exactly."""
    from nemo_automodel.components.models.deepseek_v41 import attention

    before = attention.quantize_cache
    attention.quantize_cache = lambda values, **_: values
    try:
        yield
    finally:
        attention.quantize_cache = before


class _Torch:
    """Stands for torch where a module compares dtypes with float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Lets the reference compute in float64, which it otherwise refuses."""
    from nemo_automodel.components.models.deepseek_v41 import model

    before = model.torch
    model.torch = _Torch()
    try:
        yield
    finally:
        model.torch = before


def reference(description: dict[str, Any]) -> Any:
    """Builds the reference of a config.json, without values."""
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41Config
    from nemo_automodel.components.models.deepseek_v41.model import DeepseekV41ForCausalLM

    backend = BackendConfig(
        attn="eager",
        linear="torch",
        rms_norm="torch_fp32",
        experts="torch",
        dispatcher="torch",
        gate_precision="float32",
        enable_hf_state_dict_adapter=True,
    )
    config = DeepseekV41Config(**description)
    return DeepseekV41ForCausalLM(config, backend=backend, tokenizer=tokenizer()).eval()


def random_model(seed: int) -> Any:
    """Builds a model of a random configuration with random values."""
    model = reference(oracle_config(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            normal = torch.randn(tensor.shape, generator=generator)
            spread = 0.3 if tensor.dim() == 1 else 1.3 * tensor.shape[-1] ** -0.5
            spread = 0.05 if "_hc.fn" in name else spread
            tensor.copy_(normal * spread + ("norm" in name or "q_weight" in name))
    return model


def save(model: Any, folder: Path) -> None:
    """Writes the reference's folder: config.json, weights under published names, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    tensors = model.state_dict_adapter.to_hf(dict(model.state_dict()))
    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))


def load(folder: Path) -> Any:
    """Reads a folder with the reference."""
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    description.pop("model_type")
    model = reference(description)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    model.load_state_dict(model.state_dict_adapter.from_hf(tensors), strict=True)
    return model


def family_config(seed: int) -> Any:
    """Returns a configuration of the reference, for benchmarks/families.py."""
    from nemo_automodel.components.models.deepseek_v41.config import DeepseekV41Config

    description = oracle_config(seed)
    # The reference refuses an id that its tokenizer does not have, in a continuation, too.
    description["text_config"]["vocab_size"] = IDS
    return DeepseekV41Config(**description)


def build(config: Any) -> Any:
    """Builds the reference with exact caches; it is called and saved as models of transformers."""
    from nemo_automodel.components.models.deepseek_v41 import attention

    attention.quantize_cache = lambda values, **_: values
    fields = {
        "text_config": config.text_config.to_dict(),
        "vision_config": config.vision_config.to_dict(),
        "dtype": "float32",
    }
    model = _eager(reference(fields))
    model.save_pretrained = lambda folder: save(model, Path(folder))
    return model


def _eager(model: Any) -> Any:
    """Keeps the reference from compiling, which goes wrong after a few models of a process."""
    plain = model.forward

    def forward(ids: torch.Tensor, **_: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return plain(ids)

    model.forward = forward
    return model


def again(folder: Path) -> Any:
    """Loads an exported folder with the reference."""
    return _eager(load(folder))


FAMILIES = {"deepseek_v41": family_config} if is_installed() else {}
# What expected.safetensors says about the numbers in it.
METADATA = {"cache_formats": "identity"}
IDS = 300  # of the tokenizer
