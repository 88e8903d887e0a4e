"""Writes the model card of a run: README.md in the format of the Hugging Face hub.

hub/card.py has what every card has; a run adds its data and their licence, its losses, the command
that trains it again, and the versions.
"""

import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch

from rorqual import config as configs
from rorqual.hub.card import CARD, SCORES, description, front_matter, table, usage
from rorqual.io import write_text
from rorqual.model_config import ModelConfig
from rorqual.presets import PRESETS
from rorqual.train import run_folder
from rorqual.train.config import OptimConfig, TrainConfig, recipe
from rorqual.train.source import Source, TextSource

MARK = "<!-- Written by `rorqual train`, which replaces the file while this line is in it. -->"
LAST_STEPS = 20  # steps over which the training loss is averaged


def write_card(
    folder: str | os.PathLike[str],
    config: TrainConfig,
    shape: ModelConfig,
    source: Source,
    scores: Mapping[str, float],
    seconds: float,
) -> Path:
    """Writes README.md into the folder of a run and returns its path.

    `shape` is the model's config with the ids of the tokenizer, `scores` are those of the last
    validation, `seconds` those of all training steps. A file without MARK is somebody's own text,
    and stays as it is.
    """
    path = Path(folder) / CARD
    if not path.is_file() or MARK in path.read_text(encoding="utf-8"):
        losses = run_folder.losses(folder)
        write_text(path, _text(config, shape, source, scores, seconds, losses))
    return path


def command(config: TrainConfig) -> list[str]:
    """Returns the words of the command that trains this config: `rorqual train PRESET ...`.

    The preset is the one that differs least.
    """

    def changes(name: str) -> list[str]:
        return configs.differing(PRESETS[name], config.model, "model")

    preset = min(PRESETS, key=lambda name: len(changes(name)))
    usual = recipe(config.model.dim, needles=config.needles is not None)
    kind = []
    if usual.kind != config.optim.kind:
        # Another kind than the recipe's begins with its own defaults.
        usual = OptimConfig(kind=config.optim.kind)
        kind = [f"optim.kind={usual.kind}"]
    start = TrainConfig(model=config.model, optim=usual, folder=config.folder)
    words = [*changes(preset), *kind, *configs.differing(start, config)]
    return ["rorqual", "train", preset, *words, f"folder={config.folder}"]


def _text(
    config: TrainConfig,
    shape: ModelConfig,
    source: Source,
    scores: Mapping[str, float],
    seconds: float,
    losses: list[float],
) -> str:
    """Returns the card as Markdown; `losses` are those of the steps that updated, oldest first."""
    name = Path(config.folder).name
    tokens = config.steps * config.batch_size * config.seq_len
    data, licence, sentence = _data(source, tokens)
    names = [one.removeprefix("hf:") for one in config.data.shares if one.startswith("hf:")]
    fields = {"datasets": names} if names and isinstance(source, TextSource) else {}
    last = losses[-LAST_STEPS:]
    results = {
        f"loss of the last {len(last)} steps, nats a token": f"{math.fsum(last) / len(last):.4f}"
    }
    results |= {
        f"held out, {SCORES[key][1] if key in SCORES else key}": f"{value:.4f}"
        for key, value in scores.items()
    }
    # The package itself is above every file of it, so it is not imported.
    ours = sys.modules["rorqual"].__version__
    versions = (
        f"rorqual {ours}, torch {torch.__version__}, tokenizers {tokenizers.__version__}, "
        f"Python {platform.python_version()}"
    )
    return f"""{front_matter(name, shape, data, scores, **fields)}
{MARK}

# {name}

A language model that rorqual trained on {data}.

{usage()}
{description(shape, config.seq_len)}
## Data

{sentence}

Licence of the data: {licence}

## Results

{table(results)}

What the model can do beyond these figures was not measured.

## Training

{config.steps:,} steps of {config.batch_size} x {config.seq_len} tokens, {tokens:,} tokens, in \
{seconds:,.0f} s. `train.json` has every option; this command gives the same:

```
{shlex.join(command(config))}
```

{versions}.
"""


def _data(source: Source, tokens: int) -> tuple[str, str, str]:
    """Returns what the data are called, their licence, and a paragraph about them."""
    if not isinstance(source, TextSource):
        return "needles", "none: rorqual makes them up", f"{source}."
    shares = []
    for share in source.shares:
        words = f"{share.name}, {float(share.share):.0%} of every batch"
        if share.tokens:
            words += f", {float(tokens * share.share / share.tokens):.2g} times over"
        shares.append(words)
    held_out = source.tokens.validation
    sentence = (
        f"{'; '.join(shares)}. {held_out.documents:,} documents were held out. The tokenizer has "
        f"{source.vocab_size:,} ids."
    )
    return source.tokens.about["name"], source.tokens.about["license"], sentence
