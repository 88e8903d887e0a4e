"""Tests folders of DeepSeek-V4 against transformers, in and out."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import rorqual as rq
from rorqual.hub import checkpoints, deepseek_v4
from rorqual.hub.formats import ROWS, decode, encode_e2m1, encode_e4m3
from rorqual.model import LanguageModel
from rorqual.presets import preset

sys.path.insert(0, str(Path(__file__).parent))
from doubles import check_gradients
from random_deepseek_v4 import MODEL, oracle_config

SEEDS = (1, 2)  # test_random_families has more


def oracle(seed: int) -> MODEL:
    """Returns transformers' model of a random configuration, with values that keep logits apart."""
    torch.manual_seed(seed)
    model = MODEL(oracle_config(seed)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                experts = model.config.n_routed_experts
                order = torch.rand(len(buffer), experts).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])
            elif name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def close(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    largest = expected.abs().max().clamp_min(1e-6).item()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_configuration_is_transformers_model(seed: int, tmp_path: Path) -> None:
    """Logits, loss, gradients, greedy ids with a cache and without, and the export."""
    theirs = oracle(seed)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs", dtype=torch.float32)
    # Angles are float32: gradients of longer texts differ from those of the oracle in float64.
    time = 90 if seed == 1 else 40
    ids = torch.randint(theirs.config.vocab_size, (2, time))
    expected = theirs(ids, labels=ids, use_cache=False)
    result = ours(ids)
    close(result, expected.logits)
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    loss = ours.loss(ids, labels).next_token
    close(loss, expected.loss)
    with torch.no_grad():
        cache = ours.new_cache(2)
        step = ids[:, :20]
        cached = ids[:, :20]
        for _ in range(20):
            logits = ours(step, cache=cache)[:, -1]
            step = logits.argmax(-1, keepdim=True)
            cached = torch.cat([cached, step], dim=1)
            again = theirs(cached[:, :-1], use_cache=False).logits[:, -1]
            assert torch.equal(step, again.argmax(-1, keepdim=True))
    checkpoints.export(ours, tmp_path / "ours")
    back = MODEL.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    with torch.no_grad():
        close(back(ids, use_cache=False).logits, expected.logits)
    table = deepseek_v4.aliases(ours.config)
    their_loss = lambda: theirs(ids, labels=ids, use_cache=False).loss  # noqa: E731
    padding_id = theirs.config.pad_token_id
    check_gradients(ours, theirs, table, ids, their_loss, float32=5e-5, padding_id=padding_id)


def test_published_names_are_read(tmp_path: Path) -> None:
    """A folder of ours has the published names; transformers writes others, which are read too."""
    theirs = oracle(1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoints.load(tmp_path / "theirs")
    checkpoints.export(ours, tmp_path / "ours")
    names = set(checkpoints.Files(tmp_path / "ours").where)
    assert "embed.weight" in names
    assert "layers.0.attn.kv_norm.weight" in names
    again = checkpoints.load(tmp_path / "ours")
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# What is stored as e4m3 in blocks of 128 by 128; experts are mxfp4.
DENSE = re.compile(
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight|\.[eh]_proj\.weight"
    r"|shared_experts\.w\d\."
)


def quantised(folder: Path, model: LanguageModel) -> dict[str, torch.Tensor]:
    """Writes a model in the published formats; returns the numbers that they stand for."""
    checkpoints.export(
        model,
        folder,
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        expert_dtype="fp4",
    )
    stored = {}
    numbers = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        numbers[name] = tensor
        if ".ffn.experts." in name:
            encoded = encode_e2m1(tensor)
            block = ROWS
        elif DENSE.search(name):
            encoded = encode_e4m3(tensor, (128, 128), power_of_two=True)
            block = (128, 128)
        else:
            stored[name] = tensor
            continue
        stored[name], stored[name.removesuffix(".weight") + ".scale"] = encoded
        numbers[name] = decode(*encoded, block)
        if tensor.shape[0] % 128 == tensor.shape[1] % 128 == 0 or block == ROWS:
            theirs = Fp8Dequantize(None)._dequantize_one(*encoded, torch.float32)
            assert torch.equal(numbers[name], theirs), name
    save_file(stored, folder / "model.safetensors")
    return numbers


def test_published_formats_are_read_exactly(tmp_path: Path) -> None:
    """The numbers are those of transformers' reader, and logits those of the numbers' folder."""
    tiny = preset("v4-tiny")
    # Several blocks of rows and columns, some of them incomplete.
    config = replace(
        tiny,
        vocab_size=96,
        dim=192,
        csa=replace(tiny.csa, heads=8, head_dim=32, q_lora_rank=128, o_lora_rank=96),
        moe=replace(tiny.moe, routed=4, width=160),
    )
    model = LanguageModel(config, seed=3).eval()
    numbers = quantised(tmp_path / "a", model)
    changed = [
        name
        for name, each in deepseek_v4.places(config).items()
        if not torch.equal(each.of(model.state_dict()), numbers[name])
    ]
    # 4 layers and MTP's of 5 projections, 2 indexers, 3 matrices of 5 experts; MTP's own two.
    assert len(changed) == 5 * 5 + 2 + 5 * 3 * 5 + 2
    ours = rq.load(tmp_path / "a", dtype="float32", device="cpu").model
    for name, each in deepseek_v4.places(config).items():
        assert torch.equal(each.of(ours.state_dict()), numbers[name]), name
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file(numbers, tmp_path / "b" / "model.safetensors")
    description = json.loads((tmp_path / "b" / "config.json").read_text())
    del description["quantization_config"], description["expert_dtype"]
    (tmp_path / "b" / "config.json").write_text(json.dumps(description))
    plain = checkpoints.load(tmp_path / "b")
    ids = torch.randint(96, (2, 50))
    with torch.no_grad():
        assert torch.equal(ours(ids), plain(ids))
        theirs = MODEL.from_pretrained(tmp_path / "b", dtype=torch.float32).eval()
        close(ours(ids), theirs(ids, use_cache=False).logits)
    rounded = checkpoints.load(tmp_path / "a", dtype=torch.bfloat16)
    assert torch.equal(
        rounded.state_dict()["blocks.0.attention.wq_a.weight"],
        numbers["layers.0.attn.wq_a.weight"].bfloat16(),
    )


def test_a_quantised_folder_without_its_scales_is_refused(tmp_path: Path) -> None:
    quantised(tmp_path, LanguageModel(preset("v4-tiny")))
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "layers.1.attn.wkv.scale"
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: layers\.1\.attn\.wkv"):
        checkpoints.load(tmp_path)
    tensors["layers.1.ffn.experts.3.w2.scale"] = torch.zeros(1, 7, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"misshapen: layers\.1\.ffn\.experts\.3\.w2\.scale"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_bias": True}, "mlp_bias: got True"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"scoring_func": "softmax"}, "scoring_func: got 'softmax'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: got 1 values"),
        ({"layer_types": None, "compress_ratios": [0, 4, 8, 128]}, "compress_ratios: got 8"),
        ({"mlp_layer_types": ["moe", "dense", "moe", "moe"]}, "mlp_layer_types: got"),
        ({"mlp_layer_types": ["moe", "moe", "moe"]}, "mlp_layer_types: got"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type: got 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor: got None"),
        ({"swiglu_limit": "much"}, "swiglu_limit: got 'much'"),
        ({"head_dim": 16.5}, "head_dim: got 16.5"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: got 'no'"),
        ({"mlp_layer_types": 5}, "mlp_layer_types: got 5"),
        (
            {"compress_ratios": [0, 4, 4, 4]},
            "compress_ratios: got .* expected those of layer_types",
        ),
        (
            {"partial_rotary_factor": 0.5, "qk_rope_head_dim": 8},
            "qk_rope_head_dim: got 8, expected",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: got 'awq'"),
        ({"quantization_config": "fp8"}, "quantization_config: got 'fp8'"),
        ({"quantization_config": {"expert_dtype": "int8"}}, "expert_dtype: got 'int8'"),
        ({"expert_dtype": "int4"}, "expert_dtype: got 'int4'"),
        ({"num_experts_per_tok": 17}, "moe.active: got 17"),
        ({"o_groups": 3}, "csa.groups: got 3"),
        ({"index_head_dim": 8}, "csa.rope_dim: got 16"),
        ({"num_hidden_layers": 5}, "layer_types: got 4 values"),
        ({"num_hash_layers": 5}, "num_hash_layers: got 5, expected 0 to 4 layers"),
        ({"num_hash_layers": -1, "mlp_layer_types": None}, "num_hash_layers: got -1, expected 0"),
        ({"num_hash_layers": 2}, r"got 2, expected the layers \[0\] of mlp_layer_types"),
    ],
)
def test_what_our_model_cannot_express_is_refused_by_name(change: dict, words: str) -> None:
    description = deepseek_v4.published(preset("v4-tiny"))
    assert deepseek_v4.config_of(description).csa.kinds == preset("v4-tiny").csa.kinds
    with pytest.raises(ValueError, match=words):
        deepseek_v4.config_of(json.loads(json.dumps(description | change)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob: False is ignored, DeepSeek-V4 has True only"),
        ({"n_shared_experts": 0}, "n_shared_experts: 0 is ignored, DeepSeek-V4 has 1 only"),
        ({"n_shared_experts": 2}, "n_shared_experts: 2 is ignored"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: 2 is ignored"),
    ],
)
def test_what_transformers_ignores_is_said(change, words, capsys) -> None:
    """Its models are the same with each value, as the random configurations hold."""
    description = deepseek_v4.published(preset("v4-tiny"))
    expected = deepseek_v4.config_of(description)
    assert not capsys.readouterr().err
    assert deepseek_v4.config_of(description | change) == expected
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "repeats"),
    [
        ("layers.0.attn.wkv.weight", 2),
        ("layers.0.ffn.shared_experts.w1.weight", 2),
    ],
)
def test_tensors_of_more_than_the_format_has_are_refused(name, repeats, tmp_path) -> None:
    """Two heads of keys, or a second shared expert."""
    checkpoints.export(LanguageModel(preset("v4-tiny")).eval(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name].repeat(repeats, 1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=re.escape(name)):
        checkpoints.load(tmp_path)


def test_a_rope_without_a_kind_is_the_default() -> None:
    description = deepseek_v4.published(preset("v4-tiny"))
    rope = {"rope_type": None, "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = deepseek_v4.config_of(
        description | {"rope_parameters": {"main": rope, "compress": rope}}
    )
    assert config.rope.base == 500.0 and config.csa is not None
    assert config.csa.compress_rope.yarn is None


def test_the_released_config_is_the_preset() -> None:
    """The fields of DeepSeek-V4-Flash's config.json, and of Pro's."""
    released = {
        "model_type": "deepseek_v4",
        "compress_ratios": [0, 0, 4, *[128, 4] * 20, 0],
        "num_hash_layers": 3,
        "num_nextn_predict_layers": 1,
        "qk_rope_head_dim": 64,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
    }
    config = deepseek_v4.config_of(released)
    flash = preset("deepseek-v4-flash")
    assert config.csa.kinds == flash.csa.kinds
    assert config.csa.compress_rope == flash.csa.compress_rope
    assert (config.moe, config.mtp) == (flash.moe, flash.mtp)
