"""Compares folders of random configurations of a family with the library that wrote them.

    python benchmarks/families.py deepseek_v32 --count 40
    python benchmarks/families.py                           lists the families

For each seed it draws a configuration and a model of transformers, lets that write its folder, in
one of the forms that released folders have, with what tests/golden/check.py reads (logits, hidden
states, loss, gradients, a greedy continuation, each id from an uncached forward), and holds ours
against it: everything to 1e-5, the continuation from an empty cache and without one. Then our model
is exported, transformers loads it, and its logits are compared with the first ones. The exit status
is 1 if any configuration differs.

Families are the entries of FAMILIES in tests/hub/random_*.py: name -> a function that maps a seed
to a configuration of transformers. A module may define `build(config)` if AutoModelForCausalLM does
not know its models, `stir(model, seed)` that draws its weights, `again(folder)` that loads an
exported folder, IDS, the number of ids that texts have, and METADATA of expected.safetensors, and
`float64()`, a context in which its models compute in that precision. Gradients that differ by more
than 1e-5, and logits and hidden states up to 1e-4, are compared again in float64 to 1e-6, where
both have all digits.
"""

import argparse
import importlib.util
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rorqual.hub import checkpoints  # noqa: E402
from rorqual.hub.families import family_for  # noqa: E402
from rorqual.layers import context, rope  # noqa: E402
from tests.hub.doubles import Doubles, gradients  # noqa: E402

TOLERANCE = 1e-5
SPREAD = 0.15  # standard deviation of the weights, so that logits are apart
ROUNDING = 1e-4  # of logits and hidden states in float32, where they agree in float64
EXACT = 1e-6  # relative, of gradients in float64; some constants of oracles stay float32
PROMPT = 12  # ids of the greedy continuation that are given


@cache
def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def families() -> dict[str, ModuleType]:
    """Returns the module of each family."""
    modules = [module_of(path) for path in sorted((ROOT / "tests/hub").glob("random_*.py"))]
    return {name: module for module in modules for name in getattr(module, "FAMILIES", {})}


class Result(NamedTuple):
    """The largest errors of one configuration, and what was wrong in words."""

    errors: dict[str, float]
    wrong: list[str]


def build(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def again(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def plain(model: nn.Module) -> nn.Module:
    """Lets transformers loop over experts: its grouped product wants multiples of 4 as widths."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def stir(model: nn.Module, seed: int) -> None:
    """Draws every parameter, and the buffers that are saved, so that each has an effect."""
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)
    for name, value in saved.items():
        if name.endswith("tid2eid"):
            # Different experts for each token id.
            experts = len(saved[name.removesuffix("tid2eid") + "weight"])
            order = torch.rand(len(value), experts, generator=generator).argsort(1)
            value.copy_(order[:, : value.shape[1]])
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 1 and name.endswith("weight"):
            value.copy_(1 + 0.2 * noise)
        elif name.endswith("e_score_correction_bias"):
            # A large one makes scores negative that it is added to.
            value.copy_((1.0 if seed % 3 == 2 else 0.1) * noise)
        else:
            value.copy_(noise * (SPREAD if value.dim() > 1 else 0.1))


@torch.no_grad()
def rounded(model: nn.Module) -> None:
    """Rounds every parameter to bfloat16, and keeps it in float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def as_released(folder: Path, draw: random.Random) -> None:
    """Writes a saved folder as others do.

    Perhaps as several files, in bfloat16 where that loses nothing, with rope_scaling and rope_theta
    in place of rope_parameters.
    """
    path = folder / "config.json"
    description = json.loads(path.read_text(encoding="utf-8"))
    rope = description.get("rope_parameters") or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    if rope and not nested and "partial_rotary_factor" not in rope and draw.random() < 0.5:
        del description["rope_parameters"]
        description["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        rope.pop("type", None)
        description["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    path.write_text(json.dumps(description), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value.dtype == torch.float32 and torch.equal(value.bfloat16().float(), value):
            tensors[name] = value.bfloat16()
    count = draw.choice([1, 3])
    where = {}
    if count > 1:
        (folder / "model.safetensors").unlink()
    for number in range(count):
        share = dict(sorted(tensors.items())[number::count])
        file = (
            f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        )
        save_file(share, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(share, file)
    if count > 1:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_expected(
    model: nn.Module, folder: Path, ids: Tensor, new: int, metadata: dict[str, str] | None = None
) -> Tensor:
    """Writes expected.safetensors beside a saved model; returns the logits."""
    model.zero_grad()
    out = model(ids, output_hidden_states=True, use_cache=False)
    flat = out.logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(flat, ids[:, 1:].flatten())
    loss.backward()
    expected = {"ids": ids, "logits": out.logits.detach(), "loss": loss.detach()}
    if out.hidden_states is not None and all(state.dim() == 3 for state in out.hidden_states):
        expected |= {f"hidden.{i}": state.detach() for i, state in enumerate(out.hidden_states)}
    expected |= {
        f"grad.{name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not name.startswith("model.rotary")
    }
    greedy = ids[:1, :PROMPT]
    with torch.no_grad():
        for _ in range(new):
            logits = model(greedy, use_cache=False).logits[:, -1]
            greedy = torch.cat([greedy, logits.argmax(-1, keepdim=True)], dim=1)
    expected["greedy"] = greedy
    tensors = {name: value.contiguous().clone() for name, value in expected.items()}
    save_file(tensors, folder / "expected.safetensors", metadata=metadata)
    return out.logits.detach()


@contextmanager
def frequencies_in_float32() -> Iterator[None]:
    """Lets ours round rotary frequencies to float32, as the oracles' buffers are."""
    exact = rope.rope_frequencies

    def rounded(*arguments: Any) -> Tensor:
        with torch._C.DisableTorchFunction():
            return exact(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rope, "rope_frequencies", rounded)
        patch.setattr(context, "rope_frequencies", rounded)
        yield


def wrong_in_float64(
    folder: Path, theirs: nn.Module, ids: Tensor, names: Iterable[str], module: ModuleType
) -> list[str]:
    """Compares logits and gradients of both models in float64; returns a line for each difference.

    `theirs` is in float64 afterwards.
    """
    formats = {"cache_formats": "none"} if hasattr(module, "METADATA") else {}
    ours = checkpoints.load(folder, dtype=torch.float32, **formats).double()
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pad = description.get("pad_token_id")
    theirs.double()
    labels = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)

    def their_loss() -> Tensor:
        logits = theirs(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())

    in_float64 = getattr(module, "float64", nullcontext)
    # An oracle with float64() computes its frequencies in each call, and so in that precision.
    frequencies = nullcontext if hasattr(module, "float64") else frequencies_in_float32
    with frequencies(), Doubles(), in_float64():
        exact = gradients(ours, lambda: ours.loss(ids, labels).next_token)
        expected = gradients(theirs, their_loss)
        with torch.no_grad():
            logits = theirs(ids, use_cache=False).logits
            error = ((ours(ids) - logits).abs().max() / logits.abs().max()).item()
    family = family_for(ours.config)
    config = ours.config
    table = {**family.places(config), **family.copies(config), **family.aliases(config)}
    wrong = [] if error <= EXACT else [f"WRONG {error:9.2e}  logits in float64"]
    largest = max(gradient.abs().max().item() for gradient in expected.values() if gradient.numel())
    for name in names:
        gradient = expected[name]
        result = table[name].of(exact)
        if pad is not None and table[name].name == "embed.weight":
            # transformers keeps that row fixed.
            result[pad] = gradient[pad]
        size = max(gradient.abs().max().item(), torch.finfo(torch.float32).eps * largest)
        error = (result - gradient).abs().max().item() / size
        if not error <= EXACT:
            wrong.append(f"WRONG {error:9.2e}  grad.{name} in float64")
    return wrong


def compare(name: str, seed: int, *, new: int = 16) -> Result:
    """Holds one configuration of a family against the library that defines it."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    module = families()[name]
    config = module.FAMILIES[name](seed)
    torch.manual_seed(seed)
    model = plain(getattr(module, "build", build)(config).float())
    getattr(module, "stir", stir)(model, seed)
    draw = random.Random(seed)
    if draw.random() < 0.3:
        rounded(model)
    time_steps = 20 + seed * 7 % 40
    count = getattr(module, "IDS", None) or config.get_text_config().vocab_size
    ids = torch.randint(count, (2, time_steps))
    errors: dict[str, float] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "theirs")
        exported = Path(scratch, "ours")
        model.save_pretrained(folder)
        as_released(folder, draw)
        logits = write_expected(model, folder, ids, new, getattr(module, "METADATA", None))
        doubtful = []
        for item in module_of(ROOT / "tests/golden/check.py").check(folder):
            kind = item.name.split(".")[0].split(":")[0]
            if item.error is not None:
                errors[kind] = max(errors.get(kind, 0.0), item.error)
            # Rounding is no reason for more in logits and hidden states, and none for other ids.
            limit = {"grad": math.inf, "logits": ROUNDING, "hidden": ROUNDING}.get(kind, 0.0)
            if TOLERANCE < (item.error or 0.0) < limit:
                doubtful.append(item.name.partition(",")[0])
            elif not item.right:
                wrong.append(str(item))
        if doubtful:
            names = [name.removeprefix("grad.") for name in doubtful if name.startswith("grad.")]
            wrong += wrong_in_float64(folder, model, ids, names, module)
        checkpoints.export(checkpoints.load(folder, dtype=torch.float32), exported)
        theirs = plain(getattr(module, "again", again)(exported))
        with torch.no_grad():
            out = theirs(ids, use_cache=False).logits
        errors["export"] = ((out - logits).abs().max() / logits.abs().max()).item()
        if not errors["export"] <= TOLERANCE:
            wrong.append(f"export: {errors['export']:.2e}")
    return Result(errors, wrong)


def results(name: str, seeds: range, compared: Callable[..., Result] = compare) -> Iterator[str]:
    """Yields a line for each configuration."""
    for seed in seeds:
        began = time.perf_counter()
        try:
            errors, wrong = compared(name, seed)
        except Exception as error:  # one broken configuration is one result
            message = " ".join(str(error).split())[:300]
            yield f"WRONG {name} {seed}: {type(error).__name__}: {message}"
            continue
        largest = json.dumps({kind: float(f"{error:.1e}") for kind, error in errors.items()})
        seconds = time.perf_counter() - began
        yield f"{'WRONG' if wrong else 'ok   '} {name} {seed} ({seconds:.1f} s) {largest}"
        yield from (f"      {line}" for line in wrong)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*")
    parser.add_argument("--count", type=int, default=40, help="configurations of each family")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    if not arguments.families:
        print("\n".join(families()))
        return 0
    if unknown := set(arguments.families) - families().keys():
        parser.error(f"got {', '.join(sorted(unknown))}, expected {', '.join(families())}")
    failed = 0
    for name in arguments.families:
        count = 0
        for line in results(name, range(arguments.first, arguments.first + arguments.count)):
            print(line, flush=True)
            count += line.startswith("WRONG")
        print(f"{name}: {arguments.count - count} of {arguments.count} agree", flush=True)
        failed += count
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
