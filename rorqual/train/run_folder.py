"""The folder of a training run: its files, its config, and the lock for its one writer.

train.json, metrics.jsonl, tensorboard/     from the first step on
config.json, tokenizer.json                 the model's config and its tokenizer
README.md                                   the model card, when it is finished
checkpoints/stepN/                          to resume from
checkpoints/best/                           the weights with the best validation, to read
rollbacks.json                              where the run diverged and went back to a checkpoint
profile/                                    the trace of a step, if one was asked for
model.safetensors                           the model, when it is finished
learning/, tables/                          with tables on disk: their rows during training, and
                                            after it
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rorqual import checkpoint, distributed, pretrained, runtime
from rorqual import config as configs
from rorqual.io import lock, remove_partial, write_json
from rorqual.train.config import TrainConfig

FIXED = (  # options that a resumed run may not change
    "model",
    "optim",
    "data",
    "needles",
    "init_from",
    "batch_size",
    "seq_len",
    "micro_batch_size",
    "seed",
    "dtype",
    "placement",
    "bias_rest",
    "mtp_late",
    "indexer_alone",
)
SAMPLED_BY = ("steps", "validate_every", "validation_tokens")  # they select the validation text
CONFIG = "train.json"
ROLLBACKS = "rollbacks.json"
ABANDONED = 600.0  # seconds after which a partial file is taken as abandoned


def saved_config(folder: Path) -> TrainConfig | None:
    """Returns the config that the run in a folder was last started with, None if there is none."""
    path = folder / CONFIG
    return configs.load(TrainConfig, path) if path.is_file() else None


def begun(folder: str | os.PathLike[str]) -> TrainConfig | None:
    """Returns the config of the run in a folder if the run can be resumed."""
    folder = Path(folder)
    return saved_config(folder) if has_progress(folder) else None


def has_progress(folder: Path) -> bool:
    """Returns whether a folder has a checkpoint or a model to resume from."""
    return resumes(folder) or (folder / "model.safetensors").is_file()


def resumes(folder: Path) -> bool:
    """Returns whether training in a folder begins with one of its checkpoints."""
    return bool(checkpoint.steps(folder / "checkpoints"))


def finished(config: TrainConfig) -> bool:
    """Returns whether the folder has the model of this very run, trained for as many steps."""
    folder = Path(config.folder)
    saved = saved_config(folder)
    if saved is None or saved.steps != config.steps or differences(saved, config):
        return False
    return checkpoint.is_finished(folder)


def finished_with_more_steps(config: TrainConfig) -> bool:
    """Returns whether the folder has this run, finished, with more steps; logs it.

    ValueError where the run has more steps than `config` and is not finished: there is no model
    that could be returned.
    """
    folder = Path(config.folder)
    saved = saved_config(folder)
    if saved is None or differences(saved, config):
        return False
    if saved.steps > config.steps and finished(configs.replace(saved, "folder", config.folder)):
        runtime.log(
            f"{folder} holds this run with {saved.steps} steps, {config.steps} were asked for: "
            "nothing to do; choose another --folder for a shorter run"
        )
        return True
    steps_made = max((step for step, _ in checkpoint.steps(folder / "checkpoints")), default=0)
    if steps_made > config.steps:
        raise ValueError(
            f"{folder}: got --steps {config.steps}, "
            f"expected at least the {steps_made} that are made "
            f"already (of {saved.steps}): go on with more, or choose another --folder"
        )
    return False


def differences(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Returns the dotted names of differing options that a resumed run may not change."""
    left, right = (_flat_options(config) for config in (one, other))
    return [
        name for name in sorted(left.keys() | right.keys()) if left.get(name) != right.get(name)
    ]


class Rollback(NamedTuple):
    """A return to a checkpoint of a run that diverged."""

    step: int  # the step that diverged
    checkpoint: int  # the step of the checkpoint
    reason: str


def read_rollbacks(folder: Path) -> list[Rollback]:
    """Returns the rollbacks of the run in a folder, the oldest first."""
    path = folder / ROLLBACKS
    if not path.is_file():
        return []
    return [Rollback(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


def write_rollbacks(folder: Path, rollbacks: list[Rollback]) -> None:
    """Writes the rollbacks of a run to its folder, in place of those before."""
    write_json(folder / ROLLBACKS, [each._asdict() for each in rollbacks])


def _flat_options(config: TrainConfig) -> dict[str, Any]:
    """Returns the values of the fixed options by their dotted names."""
    options = flat({name: configs.to_dict(getattr(config, name)) for name in FIXED})
    # Neither changes the tokens.
    options.pop("data.cache")
    options.pop("data.processes")
    return options | {"init_from": _absolute(config.init_from)}


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dictionaries by their dotted names."""
    options: dict[str, Any] = {}
    for name, field in value.items():
        inner = isinstance(field, Mapping)
        options |= flat(field, f"{prefix}{name}.") if inner else {f"{prefix}{name}": field}
    return options


def _absolute(path: str | None) -> str | None:
    """Returns the absolute path of a run, of a pretrained name its folder; None stays None."""
    return None if path is None else os.path.abspath(pretrained.resolve(path))


def refuse_folder_of_runs(folder: Path) -> None:
    """Raises ValueError for a folder of runs that is no run itself: files would be among them."""
    if (folder / CONFIG).is_file():
        return
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{CONFIG}")]
    inside = sorted(str(path.parent.relative_to(folder)) for path in paths)
    if inside:
        names = ", ".join([*inside[:3], *["..."] * (len(inside) > 3)])
        raise ValueError(
            f"{folder}: got a folder of runs ({names}), "
            f"expected one for this run alone: --folder {folder / 'NAME'}"
        )


def start_run(folder: Path, config: TrainConfig) -> None:
    """Writes train.json; ValueError if the folder has progress of a run with another config.

    If that run has none, its tables on disk are removed: this run draws its own rows. Rank 0 writes
    after the others have read.
    """
    with distributed.together():
        saved = saved_config(folder)
        progress = has_progress(folder)
        differing = differences(saved, config) if saved is not None else []
        if progress and differing:
            what = ", ".join(differing[:4])
            raise ValueError(
                f"{folder} holds another run ({what} differ): choose another --folder, or remove it"
            )
    with distributed.together():
        if distributed.rank() == 0:
            # Losses over another sample of the held-out documents are not comparable with this
            # run's.
            same_sample = saved is not None and all(
                getattr(saved, name) == getattr(config, name) for name in SAMPLED_BY
            )
            if differing:
                shutil.rmtree(folder / "learning", ignore_errors=True)
            if not progress:
                (folder / ROLLBACKS).unlink(missing_ok=True)
            if not progress or not same_sample:
                shutil.rmtree(folder / "checkpoints" / checkpoint.BEST, ignore_errors=True)
            (folder / checkpoint.UNDER_WAY).touch()
            # The run may be resumed from another working directory.
            configs.save(replace(config, init_from=_absolute(config.init_from)), folder / CONFIG)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Allows only one run to train in a folder at a time; ValueError while another one does.

    The lock is released when its process ends, even if it is killed.
    """
    refusal = f"{folder}: another process trains here; wait, or choose another --folder"
    with ExitStack() as locks:
        with distributed.together():
            folder.mkdir(parents=True, exist_ok=True)
            if distributed.rank() == 0:
                locks.enter_context(lock(folder / ".lock", refusal))
                # Other processes may be writing a report or edits of memory there.
                remove_partial(folder, age=ABANDONED)
        yield


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Converts the OSError of a full disk to one with an explanation.

    It tells which checkpoints are good and how to resume.
    """
    try:
        yield
    except OSError as error:
        # Only POSIX has an error number for a quota.
        full_disk = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
        if error.errno is None or error.errno not in full_disk:
            raise
        explained = OSError(
            f"{error.filename or folder}: got {os.strerror(error.errno).lower()}, expected room "
            "to write; checkpoints written before are good, and the same command goes on once "
            "there is room"
        )
        explained.errno = error.errno
        raise explained from error


def losses(folder: str | os.PathLike[str]) -> list[float]:
    """Returns the training losses of a run in nats a token, one for each step that updated."""
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
