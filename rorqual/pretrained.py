"""Finds the trained checkpoints that come with the package, by name.

    rorqual/weights/NAME/     config.json, model.safetensors, the tokenizer, train.json, README.md

Each is the preset NAME, trained on the bundled text for four to thirty minutes on one core and
stored in bfloat16. `scripts/build_pretrained.py` makes them all by `rorqual train` and
`rorqual export`.
"""

import os
from pathlib import Path

from rorqual import runtime
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

    A model, a run, its checkpoints or a folder of runs of that name here comes first; any other
    folder does not, and the log says so. ./NAME is always the folder here.
    """
    path = Path(where)
    # Path drops the dot of ./NAME, which the text still has.
    if os.fspath(where) != path.name or path.name not in names() or _is_of_runs(path):
        return path
    if path.is_dir():
        runtime.log(
            f"{where}: the pretrained model of the package; the folder {where} here holds no model"
        )
    return WEIGHTS / path.name


def _is_of_runs(folder: Path) -> bool:
    """Returns whether a folder is a model or a run, or has some.

    A run that lost all but its checkpoints is one.
    """
    files = ("config.json", "train.json", "checkpoints", "model.safetensors")
    return any((folder / name).exists() for name in files) or any(folder.glob("*/config.json"))


def is_pretrained(path: str | os.PathLike[str]) -> bool:
    """Returns whether a folder is one of the checkpoints, which no command may change."""
    return Path(path).resolve().parent == WEIGHTS.resolve()
