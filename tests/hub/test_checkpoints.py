import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

from rorqual.data import chats
from rorqual.data.tokenizer import train
from rorqual.hub import checkpoints
from rorqual.hub.auto import fast_tokenizer
from rorqual.hub.checkpoints import export, load
from rorqual.hub.deepseek import copies, places
from rorqual.hub.formats import decode
from rorqual.layers.attention import MLAConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.rope import RopeConfig, YarnConfig
from rorqual.layers.router import RouterConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.model_config import (
    DSAConfig,
    DynamicRopeConfig,
    LinearRopeConfig,
    Llama3RopeConfig,
    LongRopeConfig,
    QueryScaleConfig,
)
from rorqual.serve import generate

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ["deepseek_v3_tiny", "deepseek_v2_lite_tiny", "deepseek_v32_tiny"]

MLA = MLAConfig(heads=4, q_lora_rank=12, kv_lora_rank=10, nope_dim=6, rope_dim=4, value_dim=5)
V3 = ModelConfig(
    vocab_size=61, dim=20, layers=3, dense_width=28, mla=MLA, init_std=0.3,
    moe=MoEConfig(
        routed=8, active=3, shared=2, width=12, first_dense=1, router=RouterConfig(groups=4,
        groups_kept=2, scale=2.5)
    ),
)  # fmt: skip
YARN = YarnConfig(factor=3.0, original_length=16, mscale=0.7, mscale_all_dim=0.4)
V2_ROUTER = RouterConfig(
    score="softmax",
    groups=4,
    groups_kept=2,
    group_score="max",
    renormalise=False,
    scale=3.0,
    bias=False,
)
DSA = DSAConfig(heads=3, dim=8, top_k=4, ties="topk")
ONE_GROUP = replace(V3.moe.router, groups=1, groups_kept=1)
CONFIGS = {
    "v3": V3,
    "v3, mtp": replace(V3, mtp=MTPConfig(depth=2)),
    "v3, tied, half-split": replace(V3, tied=True, rope=RopeConfig(base=300.0, interleaved=False)),
    "v3, yarn": replace(V3, rope=RopeConfig(yarn=YARN)),
    "v3, weights as scored": replace(V3, moe=replace(V3.moe, router=replace(V3.moe.router,
    renormalise=False))),
    "v3, no shared expert, biased": replace(
        V3, mla=replace(MLA, bias=True), moe=replace(V3.moe, shared=0), mtp=MTPConfig()
    ),
    "v3, mscale alone": replace(V3, rope=RopeConfig(yarn=replace(YARN, mscale_all_dim=0.0))),
    "dense": replace(V3, moe=None, eps=1e-5),
    "dense, mtp": replace(V3, moe=None, mtp=MTPConfig()),
    "v2": replace(V3, moe=replace(V3.moe, router=V2_ROUTER)),
    "v2, one group, no q latent": replace(
        V3, mla=replace(MLA, q_lora_rank=None), moe=replace(V3.moe, router=replace(V2_ROUTER,
        groups=1, groups_kept=1))
    ),
    "v3, linear": replace(V3, rope=RopeConfig(linear=LinearRopeConfig(factor=3.0))),
    "v3, llama3": replace(V3, rope=RopeConfig(llama3=Llama3RopeConfig(original_length=16))),
    "v3, dynamic": replace(V3, rope=RopeConfig(dynamic=DynamicRopeConfig(original_length=8))),
    "v3, longrope": replace(
        V3, rope=RopeConfig(longrope=LongRopeConfig(short=(1.0, 2.0), long=(1.5, 4.0), factor=2.0,
        original_length=8))
    ),
    "v3.2": replace(V3, dsa=DSA),
    "v3.2, mtp, dense blocks between": replace(
        V3, dsa=DSA, mtp=MTPConfig(), moe=replace(V3.moe, first_dense=0, dense_layers=(1,))
    ),
    "v3.2, dense": replace(V3, dsa=DSA, moe=None, tied=True),
    "glm": replace(V3, dsa=replace(DSA, interleaved=True, shared=(1, 2)), eps=1e-5),
    "glm 4 lite": replace(
        V3, eps=1e-5, moe=replace(V3.moe, first_dense=0, dense_layers=(2,), router=ONE_GROUP)
    ),
    "a.x-k1": replace(V3, moe=replace(V3.moe, norm_eps=1e-6)),
    "mistral 4": replace(
        V3, rope=RopeConfig(yarn=YARN, query_scale=QueryScaleConfig(original_length=16)),
        moe=replace(V3.moe, router=replace(V2_ROUTER, group_score="top2", renormalise=True)),
    ),
}  # fmt: skip


def build(name: str) -> LanguageModel:
    model = LanguageModel(CONFIGS[name], seed=1)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.uniform_(-0.5, 0.1)
    return model.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the golden V3 folder, to be damaged."""
    shutil.copytree(
        GOLDEN / "deepseek_v3_tiny", tmp_path / "folder", ignore=shutil.ignore_patterns("expected*")
    )
    return tmp_path / "folder"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_covers_our_state_exactly_once(name):
    with torch.device("meta"):
        model = LanguageModel(CONFIGS[name], seed=None)
    state = model.state_dict()
    state.pop("head.weight", None) if model.config.tied else None
    covered = dict.fromkeys(state, 0)
    for position in places(model.config).values():
        covered[position.name] += position.of(state).numel()
    assert covered == {key: tensor.numel() for key, tensor in state.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_what_we_export_with_equal_logits(name, tmp_path):
    model = build(name)
    ids = torch.randint(0, 61, (2, 23))
    export(model, tmp_path, eos_token_id=60)
    # The library lists Mistral 4 only as a part of another model.
    auto = Mistral4ForCausalLM if name == "mistral 4" else AutoModelForCausalLM
    theirs, info = auto.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert theirs.config.eos_token_id == 60
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_we_load_what_we_export(name, tmp_path):
    model = build(name)
    export(model, tmp_path, shard_bytes=9000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load(tmp_path)
    others = {"moe": None, "mtp": None, "rope": RopeConfig()}
    assert replace(again.config, **others) == replace(model.config, **others)
    ours = model.config.rope
    theirs = again.config.rope
    assert replace(theirs, yarn=None) == replace(ours, yarn=None)
    if ours.yarn is not None:
        # mscale is computed from attention_factor.
        assert asdict(theirs.yarn) == pytest.approx(asdict(ours.yarn), rel=1e-9)
    if model.config.moe is not None:
        assert replace(again.config.moe, balance=model.config.moe.balance) == model.config.moe
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items()
    )
    assert (again.head.weight is again.embed.weight) == model.config.tied


@pytest.mark.parametrize("name", FOLDERS)
def test_a_golden_folder_survives_the_round_trip_bit_for_bit(name, tmp_path):
    export(load(GOLDEN / name), tmp_path / "out")
    before = load_file(GOLDEN / name / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    theirs = [
        AutoConfig.from_pretrained(path).to_dict() for path in (GOLDEN / name, tmp_path / "out")
    ]
    for config in theirs:
        for key in (
            "bos_token_id",
            "eos_token_id",
            "num_nextn_predict_layers",
            "topk_method",
            "_name_or_path",
        ):
            config.pop(key, None)
        config["rope_parameters"] = {
            k: v for k, v in config["rope_parameters"].items() if k != "type"
        }
    expected = theirs[0].keys() - {"max_position_embeddings"}
    assert {key: theirs[0][key] for key in expected} == {
        key: theirs[1].get(key) for key in expected
    }


def test_mtp_blocks_stand_behind_the_last_as_released(tmp_path):
    model = build("v3, mtp")
    export(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for depth in range(2):
        prefix = f"model.layers.{3 + depth}."
        assert torch.equal(tensors[prefix + "eh_proj.weight"], model.mtp[depth].eh_proj.weight)
        assert torch.equal(
            tensors[prefix + "shared_head.norm.weight"], model.mtp[depth].norm.weight
        )
        assert torch.equal(tensors[prefix + "embed_tokens.weight"], model.embed.weight)
        assert torch.equal(tensors[prefix + "shared_head.head.weight"], model.head.weight)
    for name in copies(model.config):
        tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load(tmp_path).config.mtp == MTPConfig(depth=2)
    tensors["model.layers.4.shared_head.head.weight"] = model.head.weight.detach() + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.layers.4.shared_head.head.weight differs .* head.weight"
    ):
        load(tmp_path)


def test_mtp_foretells_what_transformers_does_with_the_same_weights(tmp_path):
    """Each depth gets the same hidden states in both.

    transformers reads MTP blocks where it expects V3's, after layer 61, so that it is given the
    place of ours; it passes the output of `norm` to the next depth, which the model here does not.
    """
    model = build("v3, mtp")
    export(model, tmp_path)
    main = AutoModelForCausalLM.from_pretrained(tmp_path)
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[34]\."]
    oracle = MtpModel.from_pretrained(main).eval()
    ids = torch.randint(61, (1, 12))
    cache = MtpCache(config=main.config.get_mtp_config())
    hidden = model.hidden(ids[:, :9])[0]
    for depth in range(2):
        text = ids[:, 1 + depth : 10 + depth]
        positions = torch.arange(1 + depth, 10 + depth)[None]
        normed = oracle.forward_layer(depth, hidden, positions, cache, input_ids=text)
        hidden = model.draft(hidden, text, depth=depth)[0]
        expected = oracle._project_to_logits(normed)
        torch.testing.assert_close(
            model.head(model.mtp[depth].norm(hidden)), expected, rtol=1e-4, atol=1e-4
        )


def test_half_an_mtp_block_is_refused(tmp_path):
    export(build("v3, mtp"), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.4.hnorm.weight"))
    with pytest.raises(ValueError, match=r"missing: model.layers.4.hnorm.weight"):
        load(tmp_path)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (1, 1), (200, 7)])
def test_dequantise_scales_block_by_block(shape):
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.5
    expected = weight.float()
    for row in range(shape[0]):
        for column in range(0, shape[1], 128):
            expected[row, column : column + 128] *= scale[row // 128, column // 128]
    assert torch.equal(decode(weight, scale, (128, 128)), expected)


def quantise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts projections to float8 with 128 x 128 scales, as V3 is published.

    The rest becomes bfloat16.
    """
    out = {}
    for name, tensor in tensors.items():
        if "_proj" not in name:
            out[name] = tensor if name.endswith("bias") else tensor.bfloat16()
            continue
        rows, columns = (-(-size // 128) for size in tensor.shape)
        padded = torch.zeros(rows * 128, columns * 128)
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor
        scale = padded.view(rows, 128, columns, 128).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[
            : tensor.shape[0], : tensor.shape[1]
        ]
        out[name] = (tensor / spread).to(torch.float8_e4m3fn)
        out[name + "_scale_inv"] = scale
    return out


def shard(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """Deals the names out in turn, so that a weight and its scale are in different files."""
    (folder / "model.safetensors").unlink()
    where = {
        name: f"model-{i % count + 1:05}-of-{count:05}.safetensors"
        for i, name in enumerate(sorted(tensors))
    }
    for file in set(where.values()):
        save_file(
            {name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )


def test_float8_shards_are_dequantised(folder):
    plain = load(folder)
    tensors = quantise(load_file(folder / "model.safetensors"))
    shard(folder, tensors, 3)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for key, b in model.named_buffers() if key.endswith("bias")} == {torch.float32}
    width = load(folder, dtype=torch.float32)
    state = plain.state_dict()
    for name, position in places(width.config).items():
        expected = tensors[name].float()
        if name + "_scale_inv" in tensors:
            expected = decode(tensors[name], tensors[name + "_scale_inv"], (128, 128))
            assert (expected - position.of(state)).abs().max() <= 0.07 * position.of(
                state
            ).abs().max()
        assert torch.equal(position.of(width.state_dict()), expected), name
    asked = generate.load(folder, dtype="float32", device="cpu").model.state_dict()
    assert all(torch.equal(asked[name], tensor) for name, tensor in width.state_dict().items())
    ids = torch.randint(0, 211, (2, 30))
    with torch.no_grad():
        # Some tokens change experts.
        assert (width(ids) - plain(ids)).norm() < 0.25 * plain(ids).norm()


def with_scales(folder: Path, block: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": block}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))


def test_a_scale_may_belong_to_a_whole_tensor_or_to_other_blocks(folder):
    plain = load_file(folder / "model.safetensors")
    expected = load(folder).state_dict()
    narrow = {**plain, "lm_head.weight": plain["lm_head.weight"].to(torch.float8_e4m3fn)}
    for block, scale in (
        (None, torch.tensor(2.0)),
        (None, torch.full((1, 1), 2.0)),
        ([100, 20], torch.full((3, 3), 2.0)),
    ):
        save_file({**narrow, "lm_head.weight_scale_inv": scale}, folder / "model.safetensors")
        with_scales(folder, block)
        result = load(folder, dtype=torch.float32).state_dict()
        assert torch.equal(result["head.weight"], narrow["lm_head.weight"].float() * 2)
        assert torch.equal(result["embed.weight"], expected["embed.weight"])
    for block in ([128], "128", [0, 128], [128.0, 128.0], 128):
        with_scales(folder, block)
        with pytest.raises(ValueError, match="weight_block_size: got"):
            load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [True, False])
def test_loading_never_holds_the_model_twice(tmp_path, sharded):
    """Memory beyond the model during loading, mapped files included, is about two windows.

    It is measured in a separate process.
    """
    config = replace(V3, vocab_size=20_000, dim=256, moe=replace(V3.moe, routed=128, width=128))
    export(
        LanguageModel(config, seed=None),
        tmp_path / "model",
        shard_bytes=(30 << 20) if sharded else (4 << 30),
    )
    script = """
import sys, torch
from rorqual.hub import checkpoints
checkpoints.load(sys.argv[1]); checkpoints.WINDOW = 8 << 20
def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") \
if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = checkpoints.load(sys.argv[2])
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, GOLDEN / "deepseek_v3_tiny", tmp_path / "model"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, model = map(int, done.stdout.split())
    assert model > 100 << 20 and peak < 1.35 * model, f"{peak / model:.2f} times the model"


def test_one_file_is_open_at_a_time(folder, monkeypatch):
    shard(folder, load_file(folder / "model.safetensors"), 4)
    opened = []
    plain = checkpoints.safe_open
    monkeypatch.setattr(
        checkpoints, "safe_open", lambda path, *more: opened.append(path.name) or plain(path, *more)
    )
    load(folder)
    assert len(opened) <= 4 + 4 + 1 and len(set(opened)) == 4


def test_nothing_of_a_folder_is_executed(folder):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(folder / "executed"),)

    expected = load(folder).state_dict()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth"):
        torch.save({"model.norm.weight": Hostile()}, folder / name)
    (folder / "hostile.pkl").write_bytes(pickle.dumps(Hostile()))
    for name in ("modeling_deepseek.py", "configuration_deepseek.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(folder / 'executed')!r})\n")
    description = json.loads((folder / "config.json").read_text())
    description["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(description | {"trust_remote_code": True}))
    assert all(
        torch.equal(expected[key], tensor) for key, tensor in load(folder).state_dict().items()
    )
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError,
        match=r"no weights, expected model.safetensors .*pickled weights are never opened",
    ):
        load(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: not readable"):
        load(folder)
    assert not (folder / "executed").exists()


SPOILT = {
    "a tensor is missing": (
        lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"),
        r"missing: model.layers.1.mlp.experts.5.up_proj.weight$",
    ),
    "a tensor is left over": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(80, 48)}),
        r"not in this architecture: model.layers.0.self_attn.q_proj.weight$",
    ),
    "a tensor has another shape": (
        lambda t: t.update({"lm_head.weight": torch.zeros(210, 48)}),
        r"misshapen: lm_head.weight \(210, 48\), expected \(211, 48\)$",
    ),
    "a scale is missing": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
        r"missing: lm_head.weight_scale_inv$",
    ),
    "a scale of other blocks": (
        lambda t: t.update(
            {
                "lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn),
                "lm_head.weight_scale_inv": torch.ones(2, 2),
            }
        ),
        r"misshapen: lm_head.weight_scale_inv \(2, 2\), expected \(2, 1\)$",
    ),
    "a norm in float8": (
        lambda t: t.update(
            {
                "model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn),
                "model.norm.weight_scale_inv": torch.ones(1, 1),
            }
        ),
        r"misshapen: model.norm.weight_scale_inv \(1, 1\), expected \(1,\)$",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}),
        r"of a dtype other than .*: model.norm.weight I8$",
    ),
    "a bias that the config does not promise": (
        lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(48)}),
        r"not in this architecture: model.layers.0.self_attn.o_proj.bias$",
    ),
    "an MTP block far behind the last": (
        lambda t: t.update({"model.layers.99999999.enorm.weight": torch.zeros(48)}),
        r"missing: model.layers.3.*not in this architecture: model.layers.99999999.enorm.weight$",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_tensors_that_disagree_with_the_config_are_named(name, folder):
    change, words = SPOILT[name]
    rewrite(folder, change)
    with pytest.raises(ValueError, match=words):
        load(folder)


MUTATED = {  # of the golden V3 folder's config.json: every size, halved and enlarged
    "vocab_size": "lm_head", "hidden_size": "embed_tokens", "num_hidden_layers": "model.layers.",
    "intermediate_size": "layers.0.mlp", "moe_intermediate_size": "experts.0",
    "num_attention_heads": "self_attn",
    "q_lora_rank": "q_a_proj", "kv_lora_rank": "kv_a_proj", "qk_nope_head_dim": "q_b_proj",
    "qk_rope_head_dim": "kv_a_proj", "v_head_dim": "o_proj", "n_routed_experts": "experts.",
    "n_shared_experts": "shared_experts", "first_k_dense_replace": "mlp",
}  # fmt: skip


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(sorted(MUTATED)), factor=st.sampled_from([0.5, 2, 3, 10**7]))
def test_a_config_that_disagrees_with_its_tensors_is_refused_with_names(key, factor):
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        shutil.copy(GOLDEN / "deepseek_v3_tiny" / "model.safetensors", folder)
        description = json.loads((GOLDEN / "deepseek_v3_tiny" / "config.json").read_text()) | {
            "num_key_value_heads": None
        }
        size = (
            max(1, int(description[key] * factor))
            if key != "first_k_dense_replace"
            else min(2 * factor, 3)
        )
        if size == description[key]:
            return
        (folder / "config.json").write_text(
            json.dumps(description | {key: int(size) + int(size) % 2 * (key[:2] == "qk")})
        )
        with pytest.raises(
            ValueError,
            match=rf"tensors disagree with config.json.*({MUTATED[key]}|more than)|expected",
        ):
            load(folder)


@pytest.mark.parametrize(
    ("key", "expected"),
    [("num_hidden_layers", 3), ("n_routed_experts", 8), ("vocab_size", 211), ("hidden_size", 48)],
)
@pytest.mark.parametrize("size", [100, 10**7, 10**18])
def test_a_size_that_is_not_the_weights_is_refused_before_anything_is_built(
    key, expected, size, folder, monkeypatch
):
    description = json.loads((folder / "config.json").read_text())
    assert description[key] == expected
    (folder / "config.json").write_text(json.dumps(description | {key: size}))
    monkeypatch.setattr(LanguageModel, "__init__", lambda *_, **__: pytest.fail("a model is built"))
    with pytest.raises(ValueError, match=rf"{key}: got {size}, expected {expected} as they have$"):
        load(folder)


def test_sizes_that_no_tensor_can_have_are_a_line(folder):
    description = json.loads((folder / "config.json").read_text())
    for key in ("intermediate_size", "kv_lora_rank", "v_head_dim"):
        (folder / "config.json").write_text(json.dumps(description | {key: 10**30}))
        with pytest.raises(
            ValueError, match=r"config\.json: no model has such sizes, expected those"
        ) as error:
            load(folder)
        assert "\n" not in str(error.value)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_lost_a_cut_or_a_strange_tensor_is_named(data):
    tensors = load_file(GOLDEN / "deepseek_v3_tiny" / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["lost", "cut", "renamed"]))
    tensor = tensors.pop(name)
    if how == "cut":
        tensors[name] = tensor[:-1].clone()
    elif how == "renamed":
        tensors[name + "s"] = tensor
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(GOLDEN / "deepseek_v3_tiny" / "config.json", folder)
        save_file(tensors, Path(folder) / "model.safetensors")
        kind = {"lost": "missing", "cut": "misshapen", "renamed": "missing"}[how]
        words = rf"{kind}: {re.escape(name)}"
        if how == "cut" and name == "model.embed_tokens.weight":
            words = "vocab_size: got 211, expected 210"
        with pytest.raises(ValueError, match=words):
            load(folder)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "[]", "config.json: got list, expected a JSON object"),
        ("config.json", "", "config.json: not readable as JSON"),
        ("model.safetensors.index.json", "{}", "index.json: no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"x": 1}}', "index.json: no weight_map"),
        ("model.safetensors.index.json", "[1]", "index.json: got list"),
    ],
)
def test_json_of_another_kind_is_refused(folder, file, text, words):
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_many_names_are_cut_short(folder):
    rewrite(
        folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".experts." in key]
    )
    with pytest.raises(ValueError, match=r"experts.1.gate_proj.weight, .* and 40 more"):
        load(folder)


def test_incomplete_folders_are_refused_with_the_name(folder):
    shard(folder, load_file(folder / "model.safetensors"), 3)
    whole = (folder / "model-00002-of-00003.safetensors").read_bytes()
    (folder / "model-00002-of-00003.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors: not readable"):
        load(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"names model-00002-of-00003.safetensors, which the folder does not hold"
    ):
        load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"no weights, expected model.safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json: not readable"):
        load(folder)


def test_a_weight_map_stays_inside_its_folder(folder):
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../outside.safetensors"}})
    )
    with pytest.raises(ValueError, match=r"names ../outside.safetensors"):
        load(folder)


def test_another_architecture_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(
        ValueError, match="model_type: got 'llama', expected deepseek_v2, deepseek_v3, "
    ):
        load(folder)


def test_export_does_not_overwrite_a_model(folder):
    with pytest.raises(ValueError, match="already holds a model"):
        export(build("v3"), folder)


def test_a_folder_for_other_servers_has_the_logits_and_the_chat_template(tmp_path):
    """What docs/serve.md tells users of transformers serve and vLLM to type."""
    words = train(["A whale lives in the sea. user assistant"] * 9, 280)
    words.settings["chat_template"] = chats.TEMPLATE
    model = LanguageModel(replace(V3, vocab_size=words.vocab_size), seed=1).eval()
    export(model, tmp_path, eos_token_id=words.end_id, bos_token_id=words.begin_id)
    fast_tokenizer(words).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "A whale"}]
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert words.decode(ids[0].tolist()) == "<|end|>user\nA whale<|end|>assistant\n"
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
