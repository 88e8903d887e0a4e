"""Exports a model to a folder that transformers and the hub take.

    config.json, model.safetensors      the model; no code, no pickles
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    README.md                           the card of the run, or one without a training
    train.json                          of a run: what it was trained on

`import rorqual` registers the model with transformers' Auto classes, so that `from_pretrained`
loads the folder by any name that it gets on the hub.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from rorqual import checkpoint
from rorqual.hub import checkpoints
from rorqual.hub.card import CARD, description, front_matter, usage
from rorqual.io import replace_file, write_text
from rorqual.serve.generate import Run

TRAINING = "train.json"
COPIED = ("chat_template.jinja", TRAINING, CARD)  # from the folder that the model came from
CONTEXT = 4096  # tokens, of the costs in a card that no training wrote


def export(
    run: Run, folder: str | Path, *, license: str | None = None, published: bool = False
) -> Path:
    """Writes a model into a new folder and returns its path.

    `license` is the hub's name of the weights' licence, as mit; the card then has it. With
    `published` the folder is that of the architecture's authors (DeepSeek, Qwen), and transformers
    loads it without rorqual. ValueError for a folder that has a model already, for a model without
    a tokenizer, and where the published format cannot express a part.
    """
    folder = Path(folder)
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: already holds a model, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    # On the same disk, so that a file is moved at once.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as beside:
        written = Path(beside) / folder.absolute().name
        _write(run, written, license, published)
        names = [path.relative_to(written) for path in sorted(written.rglob("*")) if path.is_file()]
        there = [str(name) for name in names if (folder / name).exists()]
        if there:
            raise ValueError(
                f"{folder}: already has {', '.join(there)}, expected a folder without; "
                "move them away, or export elsewhere"
            )
        # A folder with config.json is a whole one.
        for name in sorted(names, key=lambda name: name.name == "config.json"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(written / name, folder / name)
    return folder


def _write(run: Run, folder: Path, license: str | None, published: bool) -> None:
    """Writes all files of an export into a folder that nobody reads yet."""
    tokenizer = run.tokenizer
    if published:
        checkpoints.export(
            run.model,
            folder,
            bos_token_id=tokenizer.begin_id,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.pad_id,
        )
        tokenizer.save(folder)
    else:
        checkpoint.save_model(folder, run.model, tokenizer)
    for name in COPIED:
        if run.folder is not None and (run.folder / name).is_file():
            text = (run.folder / name).read_text(encoding="utf-8")
            write_text(folder / name, _without_paths(text, run.folder))
    if not (folder / CARD).is_file():
        write_text(folder / CARD, _card(run, folder))
    if license is not None:
        card = ModelCard.load(folder / CARD)
        card.data.license = license
        card.save(folder / CARD)


def _without_paths(text: str, run: Path) -> str:
    """Returns a run's text with the last name of each path of this machine that train.json has."""
    if not (run / TRAINING).is_file():
        return text
    options = json.loads((run / TRAINING).read_text(encoding="utf-8"))
    values: list[Any] = [options]
    paths = set()
    while values:
        value = values.pop()
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and os.path.isabs(value):
            paths.add(value)
    for path in sorted(paths, key=len, reverse=True):
        # As JSON has it, too, where backslashes are doubled.
        for written in {path, json.dumps(path)[1:-1]}:
            text = text.replace(written, Path(path).name)
    return text


def _card(run: Run, folder: Path) -> str:
    """Returns the card of a model whose training is not known."""
    origin = "" if run.folder is None else f" from {run.folder.name}"
    return f"""{front_matter(folder.name, run.config)}
# {folder.name}

A language model that rorqual exported{origin}. How it was trained is not known here.

{usage()}
{description(run.config, CONTEXT)}"""
