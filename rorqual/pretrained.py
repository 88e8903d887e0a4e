"""Finds the trained checkpoints that come with the package, by name.

    rorqual/weights/NAME/     config.json, model.safetensors, the tokenizer, train.json, README.md

Each is the preset NAME, trained on the bundled text for a few minutes on one core and stored in
bfloat16. `scripts/build_pretrained.py` makes them all by `rorqual train` and `rorqual export`.
"""

import os
from pathlib import Path

from rorqual.hints import choose

WEIGHTS = Path(__file__).with_name("weights")


def names() -> list[str]:
    """Returns the names of the checkpoints, sorted."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))


def folder(name: str) -> Path:
    """Returns the folder of a checkpoint; ValueError, naming the nearest, if there is none."""
    return WEIGHTS / choose("pretrained model", name, names())


def resolve(where: str | os.PathLike[str]) -> Path:
    """Returns the folder of a checkpoint for its name, and any other path as it is.

    A model or a run in a folder of that name here comes first. ./NAME is always the folder here.
    """
    path = Path(where)
    here = any((path / file).is_file() for file in ("config.json", "train.json"))
    # Path drops the dot of ./NAME, which the text still has.
    if os.fspath(where) != path.name or here or path.name not in names():
        return path
    return WEIGHTS / path.name


def is_pretrained(path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder is one of the checkpoints, which no command may change."""
    return Path(path).resolve().parent == WEIGHTS.resolve()
