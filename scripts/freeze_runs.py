"""Records what small models compute today, so that a later version can be held against it.

    python scripts/freeze_runs.py                  runs all of tests/golden/frozen again and
                                                   rewrites it
    python scripts/freeze_runs.py --exact FOLDER   writes the results of this machine into FOLDER

A file holds "given", the complete configuration of a run, and "found", what the run computed. To
freeze another model, write a file with its "given" and run the script. tests/test_frozen.py runs
the same functions and compares.

Everything runs on the CPU, in float32, on one thread. Token ids and text come from formulas. A loss
is written as float.hex(), which loses no bit. A gradient is written as the SHA-256 of its bytes,
its sum, its norm and eight of its values. Two kinds of files exist:

    model   gradients of one step, losses of bare training steps, ids that greedy decoding gives
    train   losses of rorqual.train.trainer.train on a small text

When a redesign renames an option or a parameter, the committed files stay as they are: write the
new name into OPTIONS or PARAMETERS below.
"""

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual import config as configs
from rorqual.layers.balance import update_bias
from rorqual.layers.moba import switch
from rorqual.layers.moe import MoE
from rorqual.model import IGNORED, LanguageModel, ModelConfig
from rorqual.serve.decoding import decode
from rorqual.train.config import OptimConfig, TrainConfig
from rorqual.train.optim import Optimizer, schedule
from rorqual.train.trainer import train

FROZEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "frozen"

# The dotted name of an option in the committed files, and its name today. None: it is gone, and
# its value is what the code does now. A section's name stands for everything below it:
# {"model.hyper": "model.hyper_connections"}.
OPTIONS: dict[str, str | None] = {
    "model.hyper.exit": None,
    "train.model.hyper.exit": None,
    "model.vocabulary": "model.vocab_size",
    "model.nsa.chosen": "model.nsa.top_k",
    "model.moba.chosen": "model.moba.top_k",
    "model.dsa.chosen": "model.dsa.top_k",
    "train.model.vocabulary": "train.model.vocab_size",
    "train.model.nsa.chosen": "train.model.nsa.top_k",
    "train.model.moba.chosen": "train.model.moba.top_k",
    "train.model.dsa.chosen": "train.model.dsa.top_k",
    "train.data.vocabulary": "train.data.vocab_size",
    "train.rows": "train.batch_size",
    "train.length": "train.seq_len",
    "train.micro_rows": "train.micro_batch_size",
    "train.tables": "train.placement",
    "optim.decay": "optim.schedule",
    "train.optim.decay": "train.optim.schedule",
}
# A part of a parameter's name in the committed files, and today's:
# {"attention_site": "attention_residual"}.
PARAMETERS: dict[str, str] = {
    ".inner.compress": ".compress",
    ".inner.window": ".window",
    ".inner.gate": ".gate",
    ".inner.": ".indexer.",
    "attention_site.": "attention_residual.",
    "ffn_site.": "ffn_residual.",
    "exit.": "reduction.",
}

# standard deviation of what is added to every weight, since zeros and ones hide mistakes
STIRRED = 0.02
VALUES = 8  # recorded values of a gradient, evenly spaced


def translated(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the committed options under the names that they have today."""
    translated_options: dict[str, Any] = {}
    for path, value in _flat(frozen, ""):
        name: str | None = path
        for old, new in OPTIONS.items():
            if path == old or path.startswith(f"{old}."):
                name = None if new is None else new + path[len(old) :]
        if name is None:
            continue
        *sections, last = name.split(".")
        node = translated_options
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return translated_options


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name, node in value.items():
        yield from _flat(node, f"{path}.{name}" if path else name)


def complete(cls: type, frozen: Mapping[str, Any]) -> Any:
    """Builds the configuration `frozen`; ValueError if it leaves an option to its default."""
    config = configs.from_dict(cls, frozen)
    options = dict(_flat(frozen, ""))
    missing = [name for name, _ in _flat(configs.to_dict(config), "") if name not in options]
    if missing:
        raise ValueError(
            f"{cls.__name__}: got no {', '.join(missing)}, expected every option in the frozen "
            "file, "
            "a new one with the value that keeps the numbers"
        )
    return config


def stream(count: int, vocab_size: int, start: int = 0) -> list[int]:
    """Returns ids of a made-up language: each id is followed by one of three others."""
    ids = []
    last = start % vocab_size
    for index in range(start, start + count):
        last = (last * 5 + 17 + (index * 2654435761 >> 13) % 3) % vocab_size
        ids.append(last)
    return ids


def batch(frozen: Mapping[str, Any], step: int) -> dict[str, Tensor | None]:
    """Returns the fixed batch of a step.

    At even steps it has packed documents, whose last labels are missing.
    """
    size = frozen["batch_size"]
    length = frozen["seq_len"]
    flat = stream(size * (length + 1), frozen["model"]["vocab_size"], 1000 * step + 1)
    whole = torch.tensor(flat).view(size, length + 1)
    ids = whole[:, :-1].clone()
    labels = whole[:, 1:].clone()
    if step % 2:
        return {"ids": ids, "labels": labels, "document_ids": None}
    index = torch.arange(length).expand(size, -1)
    row = torch.arange(size)[:, None]
    document_ids = (index + 3 * row) // (length // 3 + 2) + 10 * row
    labels[:, :-1][document_ids[:, 1:] != document_ids[:, :-1]] = IGNORED
    return {"ids": ids, "labels": labels, "document_ids": document_ids}


def build(frozen: Mapping[str, Any]) -> LanguageModel:
    """Builds the model from its seed, with every weight moved a little away from zeros and ones."""
    model = LanguageModel(complete(ModelConfig, frozen["model"]), seed=frozen["seed"])
    generator = torch.Generator().manual_seed(frozen["seed"] + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=STIRRED)
        for module in model.modules():
            if isinstance(module, MoE) and module.router.e_score_correction_bias is not None:
                bias = module.router.e_score_correction_bias
                bias.add_(torch.randn(bias.shape, generator=generator), alpha=STIRRED)
    return model


def loss_of(
    model: LanguageModel, frozen: Mapping[str, Any], step: int, *, indexer_warmup: bool = False
) -> Any:
    now = batch(frozen, step)
    return model.loss(
        now["ids"], now["labels"], document_ids=now["document_ids"], indexer_warmup=indexer_warmup
    )


def gradients(
    frozen: Mapping[str, Any], step: int, *, indexer_warmup: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns digest, sum, norm and some values of each parameter's gradient after one batch."""
    model = build(frozen).train()
    loss_of(model, frozen, step, indexer_warmup=indexer_warmup).total.backward()
    results = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            results[name] = {"sha256": None, "sum": 0.0, "norm": 0.0, "values": []}
            continue
        flat = parameter.grad.detach().contiguous().flatten()
        width = flat.double()
        places = torch.linspace(0, len(flat) - 1, min(VALUES, len(flat))).long()
        results[name] = {
            "sha256": hashlib.sha256(flat.numpy().tobytes()).hexdigest(),
            "sum": float(width.sum()),
            "norm": float(width.norm()),
            "values": flat[places].tolist(),
        }
    return results


def losses(frozen: Mapping[str, Any]) -> list[str]:
    """Returns the total loss of each training step.

    The steps use the project's optimizer, schedule and balancing.
    """
    model = build(frozen).train()
    optimizer = Optimizer(model, complete(OptimConfig, frozen["optim"]))
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    dsa = model.config.dsa
    moba = model.config.moba
    result = []
    for step in range(frozen["steps"]):
        if moba is not None:
            switch(model, step + 1 > moba.full_from * frozen["steps"])
        optimizer.begin_step()
        loss = loss_of(model, frozen, step, indexer_warmup=dsa is not None and step < dsa.warmup)
        loss.total.backward()
        optimizer.clip()
        optimizer.step(schedule(step, frozen["steps"], optimizer.config))
        for number, mixture in enumerate(mixtures):
            update_bias(
                mixture.router.e_score_correction_bias,
                loss.counts[number],
                mixture.config.balance.bias_rate,
            )
        result.append(loss.total.item().hex())
    return result


def prompts(frozen: Mapping[str, Any]) -> list[list[int]]:
    vocab_size = frozen["model"]["vocab_size"]
    return [stream(length, vocab_size, 77 * length) for length in frozen["prompts"]]


def greedy(model: LanguageModel, asked: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Returns the next `count` ids of each prompt, all prompts in one batch."""
    steps = list(decode(model, asked, max_new_tokens=count))
    return [[int(step[row] or 0) for step in steps] for row in range(len(asked))]


@torch.inference_mode()
def margins(model: LanguageModel, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """Returns the lead of the best logit over the second at each new id.

    The logits come from one call without a cache.
    """
    logits = model(torch.tensor([[*prompt, *ids[:-1]]]))[0, len(prompt) - 1 :]
    best = logits.topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


def continuations(frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns greedy ids of the prompts in one batch and alone, with the latter's margins."""
    model = build(frozen).eval()
    asked = prompts(frozen)
    count = frozen["new_tokens"]
    alone = [greedy(model, [prompt], count)[0] for prompt in asked]
    return {
        "batched": greedy(model, asked, count),
        "alone": alone,
        "margins": [margins(model, prompt, ids) for prompt, ids in zip(asked, alone, strict=True)],
    }


def write_text(path: Path) -> None:
    """Writes two hundred short documents, the same everywhere."""
    animals = ("whale", "otter", "heron", "lynx", "newt")
    places = ("the sea", "a river", "the marsh", "a wood")
    documents = [
        f"{number}. A {animals[number % 5]} lives in {places[number // 5 % 4]} with "
        f"{number * 7 % 11} young, and eats "
        f"{'krill' if number % 3 else 'fish and frogs'}. It sleeps {number * 13 % 17} hours."
        for number in range(200)
    ]
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    path.write_text("".join(lines), encoding="utf-8")


def trained(frozen: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the trainer's losses, step by step, and its validation at the end."""
    text = folder / "text.jsonl"
    write_text(text)
    config = complete(TrainConfig, frozen["train"])
    for name, value in {
        "folder": folder / "run",
        "data.source": text,
        "data.cache": folder / "cache",
    }.items():
        config = configs.replace(config, name, str(value))
    lines: list[dict[str, Any]] = []
    train(config, on_metrics=lines.append)
    last = next(line for line in reversed(lines) if "validation_loss" in line)
    return {
        "losses": [line["loss"].hex() for line in lines if "loss" in line],
        "validation_loss": last["validation_loss"].hex(),
    }


def run(frozen: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Computes the whole "found" of a frozen file. `folder` is empty and is written to."""
    frozen = translated(frozen)
    if frozen["kind"] == "train":
        return trained(frozen, folder)
    return {
        "losses": losses(frozen),
        "gradients": {
            "documents": gradients(frozen, 0),
            "plain": gradients(frozen, 1, indexer_warmup=True),
        },
        "greedy": continuations(frozen),
    }


def renamed(name: str) -> str:
    """Returns a parameter's committed name as it is today."""
    for old, new in PARAMETERS.items():
        name = name.replace(old, new)
    return name


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--exact", metavar="FOLDER", help="write here, not to tests/golden/frozen")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these files alone")
    options = parser.parse_args()
    os.environ["RORQUAL_KERNELS"] = "reference"
    torch.set_num_threads(1)
    target = FROZEN if options.exact is None else Path(options.exact)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(FROZEN.glob("*.json")):
        if options.only and path.stem not in options.only:
            continue
        frozen = json.loads(path.read_text(encoding="utf-8"))["given"]
        with tempfile.TemporaryDirectory() as folder:
            result = run(frozen, Path(folder))
        text = json.dumps({"given": frozen, "found": result}, indent=1)
        (target / path.name).write_text(text + "\n", encoding="utf-8")
        last = float.fromhex(result["losses"][-1])
        print(f"{target / path.name}: {len(text):,} bytes, last loss {last:.6f}")


if __name__ == "__main__":
    main()
