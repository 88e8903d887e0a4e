"""Tests folders of Qwen4-Exp against transformers: random configurations, formats, refusals."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen4ExpTextConfig

from rorqual.hub import checkpoints, qwen4_exp
from rorqual.hub.families import family_for
from rorqual.model import LanguageModel
from rorqual.model_config import GQAConfig, ModelConfig
from rorqual.presets import preset

sys.path.insert(0, str(Path(__file__).parent))
from doubles import check_gradients

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen4_exp_tiny"


@pytest.fixture(scope="module")
def oracle():
    path = Path(__file__).with_name("random_qwen4_exp.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def error(ours: Tensor, expected: Tensor, least: float = 0.0) -> float:
    largest = max(expected.abs().max().item(), least, 1e-30)
    return (ours.double() - expected.double()).abs().max().item() / largest


SEEDS = range(2)  # test_random_families has more


@pytest.mark.parametrize("seed", SEEDS)
def test_random_configurations_are_as_in_transformers(seed, oracle, tmp_path):
    """Logits, loss, gradients, a cached continuation, and what transformers loads of our export."""
    config = oracle.oracle_config(seed)
    theirs = oracle.build(config).float().eval()
    oracle.stir(theirs, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs")
    ids = torch.randint(config.vocab_size, (2, 50))
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = theirs(ids, labels=ids, use_cache=False)
    loss = ours.loss(ids, labels).next_token
    assert error(ours(ids), expected.logits) < 1e-5
    assert error(loss, expected.loss) < 1e-5
    check_greedy(ours, theirs, ids[:1, :11])
    fresh = checkpoints.load(tmp_path / "theirs")
    checkpoints.export(fresh, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    again.set_experts_implementation("eager")
    with torch.no_grad():
        assert error(again(ids, use_cache=False).logits, expected.logits) < 1e-5
    check_gradients(
        ours,
        theirs,
        {**qwen4_exp.places(ours.config), **qwen4_exp.aliases(ours.config)},
        ids,
        lambda: theirs(ids, labels=ids, use_cache=False).loss,
        float32=3e-4,
        padding_id=config.pad_token_id,
    )


@torch.no_grad()
def check_greedy(ours: LanguageModel, theirs, ids: Tensor) -> None:
    """Continues a prompt with a cache; the oracle computes everything again for each id."""
    cache = ours.new_cache(1)
    step = ids
    for _ in range(12):
        expected = theirs(ids, use_cache=False).logits[0, -1]
        assert error(ours(step, cache=cache)[0, -1], expected) < 1e-5
        step = expected.argmax()[None, None]
        ids = torch.cat([ids, step], dim=1)


@torch.no_grad()
def test_padded_batches_are_as_in_transformers(oracle):
    """transformers pads before, we at the end; a padded row is as if it were alone."""
    theirs = oracle.modeling.Qwen4ExpForCausalLM.from_pretrained(
        GOLDEN, attn_implementation="eager"
    )
    ours = checkpoints.load(GOLDEN)
    lengths = [40, 7, 23]
    ids = torch.randint(2, ours.config.vocab_size, (3, 40))
    padded_ids = torch.full_like(ids, 1)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded_ids[row, 40 - length :], mask[row, 40 - length :] = ids[row, :length], 1
    expected = theirs(padded_ids, attention_mask=mask, use_cache=False).logits
    result = ours(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        assert error(result[row, :length], expected[row, 40 - length :]) < 1e-5


ROPES = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, two scales": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "yarn, one scale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale_all_dim": 1.0,
    },
    "yarn, a factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.3,
    },
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    # Text has one position of three kinds, whatever its sections are.
    "default": {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
}


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_every_kind_of_rope_is_as_in_transformers(name, oracle, tmp_path):
    rope = {"rope_type": name, "rope_theta": 50.0, "partial_rotary_factor": 0.5} | ROPES[name]
    config = Qwen4ExpTextConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        layer_types=["linear_attention", "indexed_attention"], num_key_value_heads=2, head_dim=16,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=1,
        linear_num_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, hc_count=2, hc_lowrank=4, indexer_n_heads=2,
        indexer_kv_heads=1, indexer_head_dim=12, indexer_budget=8, indexer_compress_ratio=2,
        rope_parameters=rope, max_position_embeddings=32,
    )  # fmt: skip
    theirs = oracle.build(config).eval()
    oracle.stir(theirs, 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs")
    ids = torch.randint(60, (2, 45))
    expected = theirs(ids, use_cache=False).logits
    assert error(ours(ids), expected) < 1e-5
    checkpoints.export(ours, tmp_path / "ours")
    assert checkpoints.load(tmp_path / "ours").config == ours.config
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert error(again(ids, use_cache=False).logits, expected) < 1e-5


def rewritten(folder: Path, tensors: dict[str, Tensor], description: dict) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def parts() -> tuple[dict[str, Tensor], dict]:
    description = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    return load_file(GOLDEN / "model.safetensors"), description


@torch.no_grad()
def test_the_text_model_of_a_multimodal_folder(tmp_path):
    """Its tensors have a prefix, and a vision tower and MTP's layers are skipped."""
    tensors, text = parts()
    named = {
        name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()
    }
    named |= {"model.visual.blocks.0.x.weight": torch.ones(3), "mtp.fc.weight": torch.ones(2, 2)}
    whole = {
        "model_type": "qwen4_exp", "text_config": text, "vision_config": {"depth": 1},
        "tie_word_embeddings": False,
    }  # fmt: skip
    ids = torch.arange(2, 40)[None]
    model = checkpoints.load(rewritten(tmp_path / "whole", named, whole))
    assert torch.equal(model(ids), checkpoints.load(GOLDEN)(ids))


@torch.no_grad()
def test_a_table_of_float8_rows_with_one_scale(tmp_path):
    tensors, description = parts()
    scale = torch.tensor([0.0125], dtype=torch.bfloat16)
    table = "model.layers.1.ple.ple_embedding.ngram_embedding"
    for shard in range(4):
        name = f"{table}.shard_{shard}.weight"
        tensors[name] = (tensors[name] / scale.float()).to(torch.float8_e4m3fn)
    tensors[f"{table}.weight_scale"] = scale
    description["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    rows = checkpoints.load(rewritten(tmp_path / "a", tensors, description)).tables[0].weight
    stored = torch.cat([tensors[f"{table}.shard_{shard}.weight"].float() for shard in range(4)])
    assert torch.equal(rows, stored * scale.float())


def test_a_hash_of_other_numbers_is_refused(tmp_path):
    tensors, description = parts()
    tensors["model.layers.1.ple.ple_embedding.layer_multipliers"][0] += 2
    with pytest.raises(ValueError, match=r"layer_multipliers differs .* addresses.multipliers"):
        checkpoints.load(rewritten(tmp_path / "a", tensors, description))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected silu"),
        ({"output_gate_type": "tanh"}, "output_gate_type: got 'tanh', expected silu or sigmoid"),
        ({"indexer_kv_heads": 2}, "indexer_kv_heads: got 2, expected 1"),
        ({"indexer_budget": None}, "no indexer_budget, expected all fields of the indexer"),
        ({"layer_types": ["mamba"] * 4}, "layer_types: got mamba, expected linear_attention or"),
        ({"layer_types": ["linear_attention"]}, "layer_types: got 1, expected the 4 of num_hid"),
        ({"ple_layer_ids": [4]}, r"ple_layer_ids: got \[4\], expected layers of linear_attention"),
        ({"ple_layer_ids": [0]}, r"ple_layer_ids: got \[0\], expected 1 to 4"),
        ({"ple_embed_dim": 63}, "ple_embed_dim: got 63, expected a multiple of the 8 heads"),
        ({"eos_token_id": None}, "eos_token_id: got None, expected a whole number"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor: got 3 of 16 values of a head"),
        ({"layer_types": 5}, "layer_types: got 5, expected a list"),
        ({"ple_layer_ids": 2}, "ple_layer_ids: got 2, expected a list"),
        ({"full_attention_interval": 0, "layer_types": None}, "full_attention_interval: got 0"),
        ({"rope_parameters": {"rope_type": "axial"}}, "type: got 'axial', expected yarn, linear"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "got dynamic with qsa, .* expected frequencies that no later position changes",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor: got None, expected a number"),
        ({"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta: got 0.1"),
        ({"quantization_config": "fp8"}, "quantization_config: got 'fp8', expected its fields"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: got 'awq', expected"),
        ({"indexer_head_dim": 8}, "qsa.dim: got 8, expected at least the 16 values that gqa"),
    ],
)
def test_what_our_model_has_not_is_refused_by_name(fields, reason):
    description = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8")) | fields
    with pytest.raises(ValueError, match=reason):
        qwen4_exp.config_of(description).check_parts()


def test_the_published_config_is_the_preset():
    """The preset is transformers' defaults and what the release sets beside them."""
    flash = preset("qwen3.8-flash-next")
    description = json.loads(
        Qwen4ExpTextConfig(
            hidden_size=2560, num_hidden_layers=48, num_attention_heads=24, head_dim=256,
            linear_num_value_heads=48, moe_intermediate_size=640,
            shared_expert_intermediate_size=640, output_gate_type="sigmoid", ple_layer_ids=[2],
            split_ngram_parts=128, eos_token_id=248_044, indexer_n_heads=4, indexer_kv_heads=1,
            indexer_head_dim=128, indexer_budget=2048, indexer_compress_ratio=4,
            rope_parameters={
                "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10], "mrope_interleaved": True,
            },
        ).to_json_string()
    )  # fmt: skip
    assert qwen4_exp.config_of(description) == flash
    assert qwen4_exp.config_of(qwen4_exp.published(flash)) == flash


@pytest.mark.parametrize("name", ["qwen3.8-flash-next", "qwen4-tiny"])
def test_presets_are_models_of_this_family(name):
    config = preset(name)
    assert family_for(config) is qwen4_exp and not qwen4_exp.foreign(config)


def test_parts_that_a_folder_cannot_hold_are_named():
    config = preset("qwen4-tiny")
    assert qwen4_exp.foreign(ModelConfig()) == ["mla", "no gqa", "no delta", "no moe", "no hyper"]
    for changed, reason in (
        ({"qsa": None}, "attention without qsa"),
        ({"gqa": GQAConfig()}, "gqa with other options"),
        ({"moe": replace(config.moe, shared_gate=False)}, "no shared expert with a gate"),
        ({"engram": replace(config.engram, conv=False)}, "engram with other options"),
    ):
        assert reason in " ".join(qwen4_exp.foreign(replace(config, **changed)))
