"""Tests DeepSeek-V4.1 folders: against golden data, the reference, and files in its formats."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rorqual as rq

sys.path.insert(0, str(Path(__file__).parent))
import random_deepseek_v41 as reference
from doubles import check_gradients

from rorqual.cli.main import main
from rorqual.hub import checkpoints, deepseek_v41
from rorqual.hub.formats import ROWS, decode, encode_e2m1, encode_e4m3
from rorqual.model import LanguageModel
from rorqual.tables import TableConfig

TINY = Path(__file__).parents[1] / "golden" / "deepseek_v41_tiny"
needs_reference = pytest.mark.skipif(not reference.is_installed(), reason=reference.MISSING)
# What is stored as e4m3 in blocks of 32 by 32.
DENSE = re.compile(
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight|shared_experts\.w\d\.weight|engram\.wkv"
)


@pytest.fixture(scope="module")
def description() -> dict:
    return json.loads((TINY / "config.json").read_text(encoding="utf-8"))


def quantised(folder: Path, *, shards: int = 1) -> dict[str, torch.Tensor]:
    """Writes the tiny folder in the published formats; returns the numbers that they stand for."""
    tensors = load_file(TINY / "model.safetensors")
    stored = {}
    numbers = {}
    for name, tensor in tensors.items():
        numbers[name], encoded, block = tensor, None, (32, 32)
        if ".ffn.experts." in name:
            padded = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % 32))
            if padded.shape == tensor.shape:
                encoded = encode_e2m1(tensor)
                block = ROWS
        elif name.endswith("engram.embed.weight"):
            encoded = encode_e4m3(tensor, ROWS, power_of_two=True)
            block = ROWS
        elif DENSE.search(name):
            encoded = encode_e4m3(tensor, block, power_of_two=True)
        if encoded is None:
            stored[name] = tensor
            continue
        stored[name], stored[name.removesuffix(".weight") + ".scale"] = encoded
        numbers[name] = decode(*encoded, block)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, folder)
    names = sorted(stored)
    parts = {f"model-{n}.safetensors": names[n::shards] for n in range(shards)}
    for file, some in parts.items():
        save_file({name: stored[name].contiguous() for name in some}, folder / file)
    if shards == 1:
        (folder / "model-0.safetensors").rename(folder / "model.safetensors")
    else:
        weight_map = {name: file for file, some in parts.items() for name in some}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return numbers


@pytest.mark.parametrize("shards", [1, 3])
def test_published_formats_are_read_exactly(tmp_path, shards):
    numbers = quantised(tmp_path, shards=shards)
    assert sum(not torch.equal(x, y) for x, y in zip(
        numbers.values(), load_file(TINY / "model.safetensors").values(), strict=True
    )) > 20  # fmt: skip
    model = rq.load(tmp_path, dtype="float32", device="cpu").model
    assert model.embed.weight.dtype == torch.float32
    for name, tensor_place in deepseek_v41.places(model.config).items():
        assert torch.equal(tensor_place.of(model.state_dict()), numbers[name]), name
    rounded = rq.load(tmp_path, dtype="bfloat16", device="cpu").model
    for name, tensor_place in deepseek_v41.places(model.config).items():
        ours = tensor_place.of(rounded.state_dict())
        assert torch.equal(ours, numbers[name].to(ours.dtype)), name


@pytest.mark.parametrize("quantise", [False, True])
def test_tables_on_the_disk_stay_in_their_files(tmp_path, quantise):
    folder = TINY
    if quantise:
        folder = tmp_path
        quantised(folder, shards=2)
    ids = torch.randint(320, (2, 30))
    with torch.no_grad():
        expected = rq.load(folder, dtype="float32", device="cpu").model(ids)
        for placement in ("disk", "host"):
            model = rq.load(folder, dtype="float32", device="cpu", tables=placement).model
            assert [table.placement for table in model.tables] == [placement] * 2
            assert not any(name.startswith("tables.") for name, _ in model.named_parameters())
            assert torch.equal(model(ids), expected)
            cache = model.new_cache(2)
            steps = [model(ids[:, i : i + 7], cache=cache) for i in range(0, 30, 7)]
            assert torch.cat(steps, dim=1).shape == expected.shape
    assert model.tables[0].metrics()["rows"] > 0


MEASURE = """
import sys
import torch
import rorqual as rq
rq.load  # with everything that it imports

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) * 1024

before = memory("VmRSS")
run = rq.load(sys.argv[1], dtype="float32", device="cpu", tables=sys.argv[2])
run.model(torch.arange(3, 40)[None])
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_table_on_the_disk_needs_no_memory(tmp_path, description):
    """The table has 200 MiB, the rest of the model 2."""
    rows = 800_000
    width = 256
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / name, tmp_path)
    text = description["text_config"]
    text = text | {
        "engram_layer_ids": [1],
        "engram_num_embeddings": [rows],
        "engram_head_dim": width,
    }
    (tmp_path / "config.json").write_text(json.dumps(description | {"text_config": text}))
    tensors = {
        name: tensor
        for name, tensor in load_file(TINY / "model.safetensors").items()
        if "layers.3.engram" not in name
    }
    tensors["layers.1.engram.wkv.weight"] = torch.randn(240, 6 * width) * 0.01
    tensors["layers.1.engram.embed.weight"] = torch.zeros(rows, width).to(torch.float8_e4m3fn)
    tensors["layers.1.engram.embed.scale"] = torch.full((rows, width // 32), 127, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    grown = {}
    for folder, placement in ((TINY, "disk"), (tmp_path, "disk"), (tmp_path, "host")):
        command = [sys.executable, "-c", MEASURE, str(folder), placement]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[folder == TINY, placement] = int(done.stdout.split()[-1])
    # The small table has 0.2 MiB: what else grows is that of kernels, which are compiled.
    small = grown[True, "disk"]
    assert grown[False, "disk"] - small < 20 << 20, grown
    assert grown[False, "host"] - small > 200 << 20, grown


def test_what_is_read_past_is_said_in_one_line(tmp_path, capsys):
    tensors = load_file(TINY / "model.safetensors")
    tensors |= {f"mtp.{n}.attn_norm.weight": torch.zeros(48) for n in range(3)}
    tensors |= {
        "mtp.0.main_proj.weight": torch.zeros(48, 144).to(torch.float8_e4m3fn),
        "mtp.0.main_proj.scale": torch.zeros(2, 5, dtype=torch.uint8),
        "mtp.1.ffn.experts.0.w1.weight": torch.zeros(32, 32, dtype=torch.int8),
        "mtp.1.ffn.experts.0.w1.scale": torch.zeros(32, 2, dtype=torch.uint8),
        "mtp.2.markov_head.embed.weight": torch.zeros(100, 8),
        "vision.norm.weight": torch.zeros(3),
        "aligner.proj.weight": torch.zeros(48, 3),
        "image_start": torch.zeros(48),
    }
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    save_file(tensors, tmp_path / "model.safetensors")
    draft = 3 * 48 + 48 * 144 + 32 * 64 + 800
    vision = 3 + 48 * 3 + 48
    line = f"skipped: DSpark draft, 3 layers, {draft:,} parameters; vision, {vision:,} parameters"
    checkpoints.load(tmp_path)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith(line)
    assert main(["params", str(tmp_path), str(TINY), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.strip() == lines[0]
    assert len({each["total"] for each in json.loads(captured.out).values()}) == 1
    checkpoints.load(TINY)
    assert not capsys.readouterr().err


def test_configs_survive_a_round_trip(description):
    config = deepseek_v41.config_of(description)
    again = deepseek_v41.published(config, canonical_ids=263)
    assert deepseek_v41.config_of(again) == config
    assert not deepseek_v41.foreign(config)


def test_the_released_config_is_the_preset():
    config = deepseek_v41.config_of({"model_type": "deepseek_v41"})
    preset = rq.preset("deepseek-v4.1-flash")
    engram = dataclasses.replace(config.engram, table_rows=None)
    assert dataclasses.replace(config, engram=engram) == preset
    assert config.engram.table_rows == (384_006_168, 384_016_682)
    from rorqual.model_config import row_totals

    assert row_totals(preset.engram) == config.engram.table_rows


REFUSED = {
    "model_type": ({"model_type": "deepseek_v4"}, "got 'deepseek_v4'"),
    "top tied": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "quantised otherwise": ({"quantization_config": {"quant_method": "awq"}}, "got 'awq'"),
    "text_config": ({"text_config": "x"}, "text_config"),
}
REFUSED_TEXT = {
    "hidden_act": "gelu",
    "attention_bias": True,
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "scoring_func": "sigmoid",
    "topk_method": "greedy",
    "o_groups": 3,
    "num_hidden_layers": 7,
    "compress_ratios": [0, 0, 2, 1, 1, 1],
    "kv_source_layer_ids": [4, 2],
    "index_source_layer_ids": [2, 5],
    "engram_num_embeddings": [660],
    "candidate_source_layer_id": 2,
    "qk_rope_head_dim": 15,
    "hidden_size": None,
    "rms_norm_eps": "small",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_configs_are_refused_by_name(description, name):
    changed, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        deepseek_v41.config_of(description | changed)


@pytest.mark.parametrize("name", REFUSED_TEXT)
def test_other_text_configs_are_refused_by_name(description, name):
    text = description["text_config"] | {name: REFUSED_TEXT[name]}
    with pytest.raises(ValueError, match=r"text_config|csa|kv_sources|ratios"):
        deepseek_v41.config_of(description | {"text_config": text})


def test_folders_that_contradict_themselves_are_refused(tmp_path, description):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        checkpoints.load(tmp_path)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    text = description["text_config"] | {"engram_compressed_vocab_size": 264}
    (tmp_path / "config.json").write_text(json.dumps(description | {"text_config": text}))
    with pytest.raises(ValueError, match="got 263 canonical ids, expected the 264"):
        checkpoints.load(tmp_path)
    text = description["text_config"] | {"engram_num_embeddings": [659, 864]}
    (tmp_path / "config.json").write_text(json.dumps(description | {"text_config": text}))
    with pytest.raises(ValueError, match="got 659 for layer 1, expected at least the 660"):
        checkpoints.load(tmp_path)


def test_a_scale_that_is_missing_is_named(tmp_path):
    quantised(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["layers.1.engram.wkv.scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: layers\.1\.engram\.wkv\.weight_scale_inv"):
        checkpoints.load(tmp_path)
    tensors["layers.1.engram.wkv.scale"] = torch.zeros(3, 3, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"misshapen: layers\.1\.engram\.wkv\.scale"):
        checkpoints.load(tmp_path)


def test_a_model_of_our_own_is_exported_and_loaded(tmp_path):
    config = rq.preset("v4.1-tiny")
    config = dataclasses.replace(config, vocab_size=320)
    canonical_map = rq.Tokenizer.load(TINY).canonical_map()
    model = LanguageModel(config, canonical_map).eval()
    checkpoints.export(model, tmp_path / "out")
    shutil.copy(TINY / "tokenizer.json", tmp_path / "out")
    again = checkpoints.load(tmp_path / "out")
    ids = torch.randint(320, (2, 40))
    changed = dataclasses.replace(again.config.csa, ties="last")
    for block in again.blocks:
        block.attention.config = changed
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


def test_parts_that_the_format_does_not_have_are_named():
    config = rq.preset("v4.1-tiny")
    engram = dataclasses.replace(config.engram, conv=True)
    assert deepseek_v41.foreign(dataclasses.replace(config, engram=engram)) == [
        "Engram's convolution"
    ]
    assert "mla" in deepseek_v41.foreign(rq.preset("tiny"))
    with pytest.raises(ValueError, match="cannot hold mla"):
        deepseek_v41.published(rq.preset("tiny"))


def test_only_models_with_csa2_have_cache_formats(tmp_path):
    golden = TINY.parent / "deepseek_v3_tiny"
    with pytest.raises(ValueError, match="cache_formats: got 'none' for a model without csa2"):
        checkpoints.load(golden, cache_formats="none")
    with pytest.raises(ValueError, match="for a model without Engram"):
        checkpoints.load(golden, tables=TableConfig(placement="disk"))


def error(ours: torch.Tensor, expected: torch.Tensor, least: float = 0.0) -> float:
    return float((ours - expected).abs().max()) / max(float(expected.abs().max()), least, 1e-30)


@needs_reference
@pytest.mark.parametrize("seed", range(2))  # test_random_families has more
def test_random_configurations_agree_with_the_reference(seed, tmp_path, monkeypatch):
    """Logits, loss and gradients; a cache; and the reference's reading of what we write."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    theirs = reference.random_model(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    time = int(torch.randint(5, 41, (), generator=generator))
    ids = torch.randint(reference.VOCAB_SIZE, (2, time), generator=generator)
    with reference.exact_caches():
        expected = theirs(ids, labels=ids)
        reference.save(theirs, tmp_path / "theirs")
        model = checkpoints.load(tmp_path / "theirs", cache_formats="none")
        logits = model(ids)
        assert error(logits, expected.logits) < 1e-5
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        loss = model.loss(ids, labels).next_token
        assert abs(loss - expected.loss) < 1e-5
        checkpoints.export(model, tmp_path / "ours")
        shutil.copy(tmp_path / "theirs" / "tokenizer.json", tmp_path / "ours")
        with torch.no_grad():
            again = reference.load(tmp_path / "ours")(ids).logits
    assert torch.equal(again, expected.logits)
    check_cache(copy.deepcopy(model), ids)
    with reference.exact_caches():
        places = deepseek_v41.aliases(model.config)
        their_loss = lambda: theirs(ids, labels=ids).loss  # noqa: E731
        check_gradients(
            model, theirs, places, ids, their_loss, float32=1e-4, float64=reference.float64
        )


@torch.no_grad()
def check_cache(model: LanguageModel, ids: torch.Tensor) -> None:
    """Compares tokens one by one with all at once, where ties do not depend on the call."""
    csa = dataclasses.replace(model.config.csa, ties="last")
    for block in model.blocks:
        block.attention.config = csa
    whole = model(ids)
    cache = model.new_cache(2)
    half = ids.shape[1] // 2
    parts = [model(ids[:, :half], cache=cache)]
    parts += [model(ids[:, i : i + 1], cache=cache) for i in range(half, ids.shape[1])]
    assert error(torch.cat(parts, dim=1), whole) < 1e-5
