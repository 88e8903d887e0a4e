"""Saves and loads checkpoints of a training run, and the folder of a finished model.

    stepN/rank*.json             everything but tensors, as JSON
    stepN/*.safetensors          tensors, by torch.distributed.checkpoint, from one process or more
    stepN/digest.json            size and SHA-256 of each of these files

A checkpoint is written to stepN.partial, flushed to the disk and renamed, so a process that is
killed at any moment leaves the checkpoint before it. It is verified before use. Nothing in it is
ever executed: only JSON and safetensors are opened. Pickles in the folder (`.pt`, `.metadata`) are
never read.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from rorqual import config as configs
from rorqual.io import (
    BINARY,
    atomic_write,
    flush,
    flush_open,
    remove_partial,
    replace_folder,
    restore_folders,
    size_and_sha256,
)
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig
from rorqual.ranks import from_first, raise_together, rank, together, world
from rorqual.runtime import log
from rorqual.tables import RowFile, TableConfig, open_tables
from rorqual.tensor_file import Layout, open_tensors, read_pieces, write_tensors

DIGEST = "digest.json"
UNDER_WAY = ".unfinished"  # a file in a run's folder until its model is written
BEST = "best"  # beside stepN: only the weights, of the lowest validation loss
FORMAT = "rorqual-state-1"
# The fields of config.json beside ModelConfig's, by which transformers recognizes a run folder.
KIND: Mapping[str, Any] = {"model_type": "rorqual", "architectures": ["RorqualForCausalLM"]}
SPECIAL = {"bos_token_id": "begin_id", "eos_token_id": "end_id", "pad_token_id": "pad_id"}
_ROWS = 1 << 16  # of a table, read at a time
_MODEL = "model."  # the prefix of a model's tensors in a checkpoint

Shapes = Mapping[str, tuple[int, ...]]


class Damaged(ValueError):
    """An error: a checkpoint does not contain what was written. The message names the file."""


def save_state(
    folder: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    values: Any,
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes tensors (DTensors of any placement too) and this rank's values as a checkpoint.

    Every rank calls it. The folder appears complete or not at all, and one that was there before
    stays until then. Off the main thread, `group` is the process group to communicate in.
    """
    write = StateWrite(folder, group=group)
    write.add("all", tensors)
    write.complete(values)


class StateWrite:
    """A checkpoint that is written in parts; `save_state` writes one at once.

    What is large is written from where it is, and the rest can be copied and written while the
    model trains on. Every rank makes the same calls. If one fails, nothing of it stays.
    """

    def __init__(
        self, folder: str | os.PathLike, *, group: dist.ProcessGroup | None = None
    ) -> None:
        self.folder = Path(folder)
        self.group = group
        self.rank = rank(group)
        self.world = world(group)
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.written: list[Path] = []  # by this rank
        with self._removed_if_it_fails(), together(group):
            if self.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)

    def add(
        self,
        label: str,
        tensors: Mapping[str, Tensor],
        pieces: Mapping[str, Callable[[int, int], Tensor]] | None = None,
    ) -> None:
        """Writes tensors, whose memory may change afterwards, to files named LABEL-RANK.

        pieces: of tensors whose memory changes meanwhile: what returns the rows from one number to
        another, of this rank's part, as they are to be written.
        """
        with self._removed_if_it_fails():
            writer = _Writer(self.partial, label, pieces)
            with _without_group_warning(), _first_failure(self.folder):
                save(
                    _packed(tensors),
                    storage_writer=writer,
                    process_group=self.group,
                    no_dist=self.world == 1,
                )
            self.written += writer.written

    def complete(self, values: Any) -> None:
        """Writes this rank's values, waits until all is on the disk, and names the folder.

        Each rank flushes and hashes the files that it wrote.
        """
        with self._removed_if_it_fails():
            digests: dict[str, dict[str, Any]] = {}
            with together(self.group):
                path = self.partial / f"rank{self.rank}.json"
                _write(path, json.dumps(encode(values)))
                for written in (*self.written, path):
                    flush(written)
                    digests[written.name] = size_and_sha256(written)
            all_digests = [digests] * self.world
            if self.world > 1:
                dist.all_gather_object(all_digests, digests, group=self.group)
            with together(self.group):
                if self.rank == 0:
                    files = {name: each[name] for each in all_digests for name in sorted(each)}
                    digest = {"format": FORMAT, "files": files, "seal": _seal(files)}
                    _write(self.partial / DIGEST, json.dumps(digest, indent=1))
                    replace_folder(self.partial, self.folder)

    @contextmanager
    def _removed_if_it_fails(self) -> Iterator[None]:
        """Removes the partial folder if the block raises: a full disk needs its space."""
        try:
            yield
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise


class _Writer(HuggingFaceStorageWriter):
    """Writes each rank's tensors to one file from where they are; torch's copies them twice."""

    def __init__(
        self,
        folder: Path,
        label: str,
        pieces: Mapping[str, Callable[[int, int], Tensor]] | None,
    ) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.label = label
        self.pieces = pieces
        self.written: list[Path] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the tensors of this rank's plan to one file, with their offsets in the whole."""
        tensors: dict[str, Tensor] = {}
        offsets = {}
        for item in plan.items:
            assert item.tensor_data is not None
            name = item.index.fqn
            tensors[name] = cast(Tensor, planner.resolve_data(item))
            offsets[name] = {SAVED_OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        if tensors:
            metadata = {CUSTOM_METADATA_KEY: json.dumps(offsets), "format": "pt"}
            path = self.folder / f"{self.label}-{plan.storage_data['shard_index']:05d}.safetensors"
            write_tensors(path, tensors, metadata, self.pieces)
            self.written.append(path)
        future: Future[list[WriteResult]] = Future()
        future.set_result([])
        return future


class _Reader(HuggingFaceStorageReader):
    """Reads pieces of files by position; torch's maps whole files into memory."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the tensors of the plan, piece by piece, each file opened once."""
        items: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            path = self.storage_data[item.storage_index].relative_path
            items.setdefault(path, []).append(item)
        for path, wanted in items.items():
            with open_tensors(path) as file:
                for item in wanted:
                    sizes = zip(item.storage_offsets, item.lengths, strict=True)
                    slices = [slice(first, first + count) for first, count in sizes]
                    target = planner.resolve_tensor(item).detach()
                    for rows, values in read_pieces(file, item.storage_index.fqn, slices):
                        target[rows].copy_(values)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future


def load_state(
    folder: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    *,
    verified: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Fills tensors in place from a checkpoint; returns this rank's values, or rank 0's.

    Raises Damaged if the files are not those that were written, and ValueError if other names or
    shapes were saved. Every rank calls it. verified: `latest` has just found the folder good.
    """
    folder = Path(folder)
    if not verified:
        verify(folder, shared=True, group=group)
    with together(group):
        _compare(folder, _saved_shapes(folder), _shapes(tensors))
    _read(folder, tensors, group)
    return read_values(folder, rank(group))


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each tensor of a checkpoint, from the headers alone."""
    entries = _Reader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: tuple(entry.size)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _read(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Fills tensors in place from a verified checkpoint, each rank its own shards."""
    reader = _Reader(str(folder))
    single = world(group) == 1
    with _without_group_warning(), _first_failure(folder):
        load(dict(tensors), storage_reader=reader, process_group=group, no_dist=single)


def read_values(folder: Path, rank: int = 0) -> Any:
    """Reads a rank's values; a rank that the run did not have gets those of rank 0."""
    path = folder / f"rank{rank}.json"
    if not path.exists():
        path = folder / "rank0.json"
    return decode(json.loads(path.read_text(encoding="utf-8")))


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Returns whether a folder is a checkpoint that was finished; `verify` checks its bytes."""
    return (Path(folder) / DIGEST).is_file()


def verify(
    folder: str | os.PathLike,
    *,
    finite: bool = False,
    shared: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Raises Damaged, naming the file, unless the files are those of the digest, byte for byte.

    finite: a NaN or an infinity counts as damage. shared: every rank of `group` calls it and reads
    a part of the files, and all raise if one does.
    """
    folder = Path(folder)
    ranks = partial(together, group) if shared else nullcontext
    with ranks():
        files = _read_digest(folder)
    names = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    number, count = (rank(group), world(group)) if shared else (0, 1)
    with ranks():
        for name in names[number::count]:
            _verify_file(folder / name, files[name])
            if finite and name.endswith(".safetensors"):
                _check_finite(folder / name)


def _read_digest(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Reads the digest of a checkpoint: the size and hash of each file, by name."""
    path = folder / DIGEST
    try:
        digest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(digest["files"])
        written_format = digest["format"]
        seal = digest["seal"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = type(error).__name__
        raise Damaged(f"{path}: got {kind}, expected the digest of a checkpoint") from error
    if written_format != FORMAT:
        raise Damaged(f"{path}: got format {written_format!r}, expected {FORMAT!r}")
    if seal != _seal(files):
        expected = f"expected seal {str(seal)[:12]}.."
        raise Damaged(f"{path}: got other text than was written, {expected}")
    names = {
        path.name for pattern in ("*.safetensors", "rank*.json") for path in folder.glob(pattern)
    }
    unknown = names - files.keys()
    if unknown:
        path = folder / min(unknown)
        raise Damaged(f"{path}: got a file that the digest does not name, expected none")
    return files


def _verify_file(path: Path, expected: Mapping[str, Any]) -> None:
    """Raises Damaged unless a file has the size and the SHA-256 of the digest."""
    size = expected["bytes"]
    if not path.is_file():
        raise Damaged(f"{path}: got no file, expected {size} bytes")
    if path.stat().st_size != size:
        cut = path.stat().st_size
        raise Damaged(f"{path}: got {cut} bytes, expected {size}: it is cut short")
    if size_and_sha256(path) != expected:
        wanted = f"expected SHA-256 {expected['sha256'][:12]}.."
        raise Damaged(f"{path}: got other bytes than were written, {wanted}")


def _seal(files: Mapping[str, Any]) -> str:
    """Returns a digest of the digest, so that damage to it is not blamed on the files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def steps(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    """Returns the finished checkpoints `stepN` in a folder, oldest first."""
    checkpoints = []
    for path in Path(folder).glob("step*"):
        match = re.fullmatch(r"step(\d+)", path.name)
        if match and is_checkpoint(path):
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)


def step_of(folder: str | os.PathLike) -> int:
    """Returns the number N of a checkpoint folder `stepN`."""
    return int(Path(folder).name.removeprefix("step"))


def latest(folder: str | os.PathLike, *, shared: bool = False) -> Path | None:
    """Returns the newest good checkpoint in a folder, or None if there is no checkpoint at all.

    A good one passes `verify`, and all its numbers are finite. Others are logged. If none is good
    it raises Damaged: starting again would hide that. shared: as of `verify`.
    """
    error: Damaged | None = None
    candidates = from_first(partial(steps, folder)) if shared else steps(folder)
    for _, path in reversed(candidates):
        try:
            verify(path, finite=True, shared=shared)
            return path
        except Damaged as damage:
            error = damage
            log(f"{damage}; trying the checkpoint before it")
    if error is not None:
        raise Damaged(
            f"{folder}: every checkpoint is damaged (last: {error}); "
            "move the folder away to start again"
        )
    return None


def _check_finite(path: Path) -> None:
    """Raises Damaged, naming the tensor, if a number in a file is NaN or infinite."""
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            if any(not_finite({name: values}) for _, values in read_pieces(file, name)):
                raise Damaged(
                    f"{path}: got {name} with NaN or infinite numbers, "
                    "expected a training that is sound"
                )


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with a NaN or an infinity, in this rank's shard."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.is_floating_point() or not local.numel():
            continue
        # The extremes need no second tensor of that size, and are NaN where any number is.
        if not torch.stack(local.detach().aminmax()).isfinite().all():
            return name
    return None


def recover(folder: str | os.PathLike) -> None:
    """Completes or removes what a killed process was writing in a folder of checkpoints.

    Only the one process that writes there calls it, before it begins.
    """
    folder = Path(folder)
    restore_folders(folder)
    remove_partial(folder)
    for beside in folder.glob("*.partial"):
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)


def is_finished(folder: str | os.PathLike) -> bool:
    """Returns whether a folder has a model that no training is about to replace."""
    folder = Path(folder)
    return (folder / "model.safetensors").is_file() and not (folder / UNDER_WAY).exists()


def readable(folder: str | os.PathLike) -> bool:
    """Returns whether a folder is a run with a finished model or a checkpoint to read."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return False
    if (folder / "model.safetensors").is_file():
        return True
    checkpoints = folder / "checkpoints"
    return is_checkpoint(checkpoints / BEST) or bool(steps(checkpoints))


def run_of(folder: str | os.PathLike) -> Path:
    """Returns the run's folder of a checkpoint RUN/checkpoints/NAME, and any other folder itself.

    ValueError for a checkpoint elsewhere: the run's folder has the model's config and tokenizer.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        return folder
    run = folder.absolute().parent.parent
    if not folder.is_absolute() and len(folder.parts) > 2:
        run = folder.parent.parent
    if not (run / "config.json").is_file():
        raise ValueError(
            f"{folder}: got a checkpoint without config.json two folders above it, expected it "
            "inside its run, as RUN/checkpoints/stepN (a run of an older version writes "
            "config.json when it goes on: rorqual train RUN)"
        )
    return run


def save_model(folder: str | os.PathLike, model: LanguageModel, tokenizer: Any = None) -> None:
    """Writes config.json, the tokenizer and, last, model.safetensors into a folder.

    transformers' Auto classes open it too. Every rank calls it, and writes the rows that it has of
    each tensor; what is sharded otherwise is gathered, one tensor at a time, and rank 0 writes it.
    """
    folder = Path(folder)
    state = dict(model.state_dict())
    if model.config.tied:
        # safetensors refuses two names for one tensor.
        del state["head.weight"]
    with together():
        if rank() == 0:
            describe_model(folder, model.config, tokenizer)
    path = folder / "model.safetensors"
    if world() == 1:
        with atomic_write(path) as beside:
            write_tensors(beside, state, {"format": "pt"})
    else:
        write_together(path, state)


def write_together(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file by all ranks. OSError on every rank where one cannot write."""
    layout = Layout(state, {"format": "pt"})
    with ExitStack() as atomic:
        names = [""]
        with together():
            if rank() == 0:
                names = [os.fspath(atomic.enter_context(atomic_write(path)))]
        dist.broadcast_object_list(names, src=0)
        # The file has its length before others write to it.
        with together(), _naming(path):
            file = os.open(names[0], os.O_WRONLY | BINARY)
            atomic.callback(os.close, file)
            if rank() == 0:
                layout.write_header(file)
        error: OSError | None = None
        for name, tensor in state.items():
            # A tensor may be gathered, by all ranks, whatever one of them could not write.
            rows = _rows_of_rank(tensor)
            try:
                if rows is not None and error is None:
                    with _naming(path):
                        layout.write(file, name, *rows)
            except OSError as failure:
                error = failure
        raise_together(error)
        with together(), _naming(path):
            flush_open(file)
        # Rank 0 names the file.
        with together():
            atomic.pop_all().close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes an OSError of the block name this path."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _write(path: Path, text: str) -> None:
    """Writes a new file. OSError, which names it, where that is not possible."""
    with _naming(path):
        path.write_text(text, encoding="utf-8")


def _rows_of_rank(tensor: Tensor) -> tuple[Tensor, int] | None:
    """Returns the rows of a tensor that this rank writes, and the number of the first of them.

    Every rank calls it for the same tensors.
    """
    if isinstance(tensor, DTensor):
        if all(type(placement) in (Shard, Replicate) for placement in tensor.placements):
            _, offsets = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            if not any(offsets[1:]) and tensor.to_local().shape[1:] == tensor.shape[1:]:
                return tensor.to_local(), offsets[0] if offsets else 0
        tensor = tensor.full_tensor()
    return (tensor, 0) if rank() == 0 else None


def describe_model(folder: str | os.PathLike, config: ModelConfig, tokenizer: Any = None) -> None:
    """Writes config.json and the tokenizer: all of a model but its weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {}
    if tokenizer is not None:
        tokenizer.save(folder)
        special = {key: getattr(tokenizer, name) for key, name in SPECIAL.items()}
    configs.save({**KIND, **configs.to_dict(config), **special}, folder / "config.json")


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads the ModelConfig of a run folder, or of one that RorqualForCausalLM saved.

    ValueError, naming the file, for a model of another kind.
    """
    path = Path(folder) / "config.json"
    description = _read_description(path)
    try:
        kind = description.get("model_type", KIND["model_type"])
        if kind != KIND["model_type"]:
            raise ValueError(f"got model_type {kind!r}, expected a rorqual run")
        fields = {k: v for k, v in description.items() if k not in KIND and k not in SPECIAL}
        return configs.from_dict(ModelConfig, description.get("shape", fields))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Returns whether config.json is that of a run of rorqual, and not one of transformers."""
    description = _read_description(Path(folder) / "config.json")
    kind = description.get("model_type", KIND["model_type"])
    return kind == KIND["model_type"] and "shape" not in description


def _read_description(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a config.json; ValueError, naming the file, for anything else."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): was it written to the end?") from error
    if not isinstance(description, dict):
        kind = type(description).__name__
        raise ValueError(f"{path}: got {kind}, expected a JSON object")
    return description


def load_model(
    folder: str | os.PathLike,
    device: str | torch.device = "cpu",
    tables: TableConfig | None = None,
) -> LanguageModel:
    """Loads the model of a run's folder, in evaluation mode. `tables` is the placement of its rows.

    An unfinished run is read from its newest good checkpoint; RUN/checkpoints/stepN reads that
    checkpoint. The log names its step. ValueError for another folder, Damaged for incomplete
    weights, TableError for an incomplete table.
    """
    folder = Path(folder)
    tables = tables or TableConfig()
    if is_checkpoint(folder):
        return _load_checkpoint(folder, device, tables)
    if (folder / "config.json").is_file() and not is_finished(folder):
        model = _load_newest(folder, device, tables)
        if model is not None:
            return model
    missing = [n for n in ("config.json", "model.safetensors") if not (folder / n).is_file()]
    if missing:
        hint = "expected a run's folder (make one with `rorqual train`)"
        if (folder / "train.json").is_file():
            hint = (
                "expected a run that has a checkpoint or is finished; "
                f"go on: rorqual train {folder}"
            )
        raise ValueError(f"{folder}: got no {' and no '.join(missing)} and no checkpoint, {hint}")
    return _load_finished(folder, device, tables)


def _load_finished(folder: Path, device: str | torch.device, tables: TableConfig) -> LanguageModel:
    """Loads the model from config.json and model.safetensors, and its rows from their placement."""
    config = read_config(folder)
    if config.engram is None and tables != TableConfig():
        raise ValueError(
            f"{folder}: got {tables} for a model without Engram, "
            "expected none: it has no rows to keep elsewhere"
        )
    path = folder / "model.safetensors"
    stored = stored_shapes(path)
    check_sizes(folder, config, stored)
    elsewhere = tables.placement != "device" or tables.folder is not None
    in_files = "tables.0.weight" not in stored and (folder / "tables").is_dir()
    state = _read_weights(path, str(device), without_tables=elsewhere)
    if config.tied:
        state.setdefault("head.weight", state["embed.weight"])
    opened = None
    if elsewhere or in_files:
        opened = open_tables(folder, len(config.engram.layers) if config.engram else 0, tables)
    with torch.device(device):
        # Engram reads the canonical map from the state.
        model = LanguageModel(config, seed=None, tables=opened)
    model_state = model.state_dict()
    if opened is not None:
        state |= {name: value for name, value in model_state.items() if name.startswith("tables.")}
    _compare(folder, _shapes(state), _shapes(model_state))
    model.load_state_dict(state)
    return model.to(device).eval()


def _read_weights(path: Path, device: str, without_tables: bool) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file to a device, all or those that are no table."""
    with _open_weights(path, device) as file:
        names = list(file.keys())
        if without_tables:
            names = [name for name in names if not name.startswith("tables.")]
        return {name: file.get_tensor(name) for name in names}


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of a safetensors file from its header."""
    with _open_weights(path, "cpu") as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


@contextmanager
def _open_weights(path: Path, device: str) -> Iterator[Any]:
    """Opens a safetensors file; Damaged if it is incomplete."""
    try:
        with safe_open(path, "pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise Damaged(f"{path}: got a torn file ({error}), expected safetensors") from error


def load_weights(
    folder: str | os.PathLike[str], model: LanguageModel, *, without_engram: bool = False
) -> bool:
    """Fills a model in place with the weights of a run, as `load_model` would find them.

    Every rank calls it, and reads its shards of each tensor alone. ValueError for a run of another
    model. If `without_engram`, the run may lack the Engram that the model has; returns whether it
    does.
    """
    folder = Path(folder)
    with together():
        run = run_of(folder)
        engram = read_config(run).engram
    lacks = without_engram and engram is None and model.config.engram is not None
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (lacks and (".engram." in name or name.startswith(("addresses.", "tables."))))
    }
    # Engram derives tensors from its canonical map when it is loaded.
    addresses = {
        name: torch.empty_like(tensor)
        for name, tensor in state.items()
        if name.startswith("addresses.")
    }
    state |= addresses
    source = _newest_weights(folder)
    with together():
        if source is None:
            _read_finished(folder, model, state)
    if source is not None:
        named = {f"{_MODEL}{name}": tensor for name, tensor in state.items()}
        saved = {n: shape for n, shape in _saved_shapes(source).items() if n.startswith(_MODEL)}
        with together():
            _compare(source, saved, _shapes(named))
        _read(source, named)
        log(_where_read(run, source))
    if model.addresses is not None and addresses:
        buffers = {name.removeprefix("addresses."): tensor for name, tensor in addresses.items()}
        model.addresses.load_state_dict(buffers)
    return lacks


def _newest_weights(folder: Path) -> Path | None:
    """Returns the checkpoint that has the weights of a run; None for a finished one.

    All ranks call it and follow rank 0, since the run may go on meanwhile.
    """
    if not from_first(partial(is_checkpoint, folder)):
        if from_first(partial(is_finished, folder)):
            return None
        checkpoints = folder / "checkpoints"
        best = checkpoints / BEST
        try:
            path = latest(checkpoints, shared=True)
        except Damaged:
            if not from_first(partial(is_checkpoint, best)):
                raise
            path = None
        if path is not None:
            return path
        if not from_first(partial(is_checkpoint, best)):
            if from_first((folder / "model.safetensors").is_file):
                return None
            raise ValueError(f"{folder}: got no model and no checkpoint, expected a run with one")
        folder = best
    verify(folder, shared=True)
    return folder


def _read_finished(folder: Path, model: LanguageModel, state: Mapping[str, Tensor]) -> None:
    """Fills this rank's shards of tensors from model.safetensors, and rows from FOLDER/tables."""
    path = folder / "model.safetensors"
    stored = stored_shapes(path)
    wanted = dict(state)
    if model.config.tied:
        # It is the embedding's.
        wanted.pop("head.weight", None)
    if "tables.0.weight" in state and "tables.0.weight" not in stored:
        for number in range(len(model.tables)):
            _read_rows(folder / "tables" / str(number), wanted.pop(f"tables.{number}.weight"))
    _compare(folder, stored, _shapes(wanted))
    with open_tensors(path) as file:
        for name, tensor in wanted.items():
            local, slices = _local_part(tensor)
            for rows, values in read_pieces(file, name, slices):
                local[rows].copy_(values)


def _read_rows(path: Path, tensor: Tensor) -> None:
    """Fills this rank's rows of a table from the files of a table."""
    local, (rows, _) = _local_part(tensor)
    file = RowFile(path, "rows")
    try:
        for start in range(rows.start, rows.stop, _ROWS):
            ids = np.arange(start, min(start + _ROWS, rows.stop))
            values = file.numbers(file.read(ids))
            local[start - rows.start : start - rows.start + len(ids)].copy_(values)
    finally:
        file.close()


def _local_part(tensor: Tensor) -> tuple[Tensor, list[slice]]:
    """Returns this rank's part of a tensor, and where it is in the whole."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, [slice(0, size) for size in tensor.shape]
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    slices = [slice(first, first + size) for first, size in zip(offsets, sizes, strict=True)]
    return tensor.to_local(), slices


def _load_newest(
    folder: Path, device: str | torch.device, tables: TableConfig
) -> LanguageModel | None:
    """Loads the newest good checkpoint, else the best one; returns None if there is neither.

    Training may remove a checkpoint while it is read. It then writes newer ones, so the newest is
    looked up again.
    """
    checkpoints = folder / "checkpoints"
    best = checkpoints / BEST
    while True:
        seen = steps(checkpoints)
        try:
            try:
                path = latest(checkpoints)
            except Damaged:
                if not is_checkpoint(best):
                    raise
                path = None
            if path is not None:
                return _load_checkpoint(path, device, tables, verified=True)
            return _load_checkpoint(best, device, tables) if is_checkpoint(best) else None
        except (ValueError, OSError, RuntimeError, SafetensorError):
            if steps(checkpoints) == seen:
                raise


def _load_checkpoint(
    folder: Path,
    device: str | torch.device,
    tables: TableConfig,
    *,
    verified: bool = False,
) -> LanguageModel:
    """Loads the model of a checkpoint without the optimizer's state, and logs its step."""
    run = run_of(folder)
    if tables != TableConfig():
        raise ValueError(
            f"{folder}: got {tables}, "
            "expected none: rows of a checkpoint are read into memory alone"
        )
    if not verified:
        verify(folder)
    config = read_config(run)
    saved = {
        name.removeprefix(_MODEL): shape
        for name, shape in _saved_shapes(folder).items()
        if name.startswith(_MODEL)
    }
    check_sizes(run, config, saved)
    model = LanguageModel(config, seed=None)
    state = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    absent = sorted(n for n in state.keys() - saved.keys() if n.startswith("tables."))
    if absent:
        raise ValueError(
            f"{folder}: got a checkpoint without {absent[0]}, whose rows learn on the disk and go "
            "on changing, expected rows in memory; finish the run to read it: rorqual train "
            f"{run}"
        )
    _compare(folder, saved, _shapes(state))
    _read(folder, {f"{_MODEL}{name}": tensor for name, tensor in state.items()})
    # Not filled in place: Engram derives tensors from its canonical map when it is loaded.
    model.load_state_dict(state)
    log(_where_read(run, folder))
    return model.to(device).eval()


def _where_read(run: Path, folder: Path) -> str:
    """Describes a checkpoint that was read: its run, its step and the run's number of steps."""
    path = run / "train.json"
    total = json.loads(path.read_text(encoding="utf-8")).get("steps") if path.is_file() else None
    of = "" if total is None else f" of {total:,}"
    if folder.name == BEST:
        values = read_values(folder)
        loss = f"validation loss {values['validation_loss']:.4f}"
        return f"{run}: the best checkpoint, read at step {values['step']:,}{of} ({loss})"
    step = re.sub(r"\D", "", folder.name)
    named = f"step {int(step):,}{of}" if step else folder.name
    return f"{run}: {'a checkpoint' if is_finished(run) else 'not finished'}, read at {named}"


def check_sizes(folder: Path, config: ModelConfig, shapes: Shapes) -> None:
    """Raises ValueError if a config's sizes are not those of the weights.

    It is called before a model of these sizes is built. Options with little effect on the size are
    checked by the comparison of all tensors afterwards.
    """
    wrong = f"{folder}: config.json: "
    depth = config.mtp.depth if config.mtp is not None else 0
    for option, got, prefix in (("layers", config.layers, "blocks"), ("mtp.depth", depth, "mtp")):
        matches = (re.match(rf"{prefix}\.(\d+)\.", name) for name in shapes)
        stored = len({match[1] for match in matches if match})
        if got != stored:
            raise ValueError(f"{wrong}{option}: got {got}, expected {stored} as the weights have")
    for option, got, tensor, axis in _sizes(config):
        shape = shapes.get(tensor, ())
        if axis < len(shape) and got != shape[axis]:
            raise ValueError(f"{wrong}{option}: got {got}, expected {shape[axis]} as {tensor} has")
    if config.engram is not None and "tables.0.weight" in shapes:
        # A head has a prime number of rows, at least as many as in the config.
        rows = shapes["tables.0.weight"][0]
        per_head = config.engram.rows_per_head
        least = sum(per_head) * config.engram.heads
        if least > rows:
            raise ValueError(
                f"{wrong}engram.rows_per_head: got {per_head}, {least} rows or more, "
                f"expected {rows} in all"
            )


def _sizes(config: ModelConfig) -> Iterator[tuple[str, int, str, int]]:
    """Yields the options that determine a model's size: (name, value, tensor, axis of the size)."""
    attention = "blocks.0.attention"
    yield "vocab_size", config.vocab_size, "embed.weight", 0
    yield "dim", config.dim, "embed.weight", 1
    yield "dense_width", config.dense_width, "blocks.0.ffn.gate_proj.weight", 0
    if config.moe is not None:
        moe = config.moe
        ffn = f"blocks.{moe.first_dense}.ffn"
        yield "moe.routed", moe.routed, f"{ffn}.experts.down", 0
        yield "moe.width", moe.width, f"{ffn}.experts.down", 1
        if moe.shared:
            shared = f"{ffn}.shared.gate_proj.weight"
            yield "moe.shared, in widths,", moe.shared_hidden, shared, 0
    if config.mla is not None:
        mla = config.mla
        keys = mla.heads * (mla.nope_dim + mla.value_dim)
        values = mla.heads * mla.value_dim
        yield "mla.kv_lora_rank", mla.kv_lora_rank, f"{attention}.kv_a_layernorm.weight", 0
        if mla.q_lora_rank is not None:
            yield "mla.q_lora_rank", mla.q_lora_rank, f"{attention}.q_a_layernorm.weight", 0
        yield "mla.heads * mla.value_dim", values, f"{attention}.o_proj.weight", 1
        yield "mla.heads * (nope_dim + value_dim)", keys, f"{attention}.kv_b_proj.weight", 0
    if config.gqa is not None:
        gqa = config.gqa
        queries = gqa.heads * gqa.head_dim
        keys = gqa.kv_heads * gqa.head_dim
        yield "gqa.heads * gqa.head_dim", queries, f"{attention}.q_proj.weight", 0
        yield "gqa.kv_heads * gqa.head_dim", keys, f"{attention}.k_proj.weight", 0
    if config.csa is not None:
        csa = config.csa
        yield "csa.heads", csa.heads, f"{attention}.attn_sink", 0
        yield "csa.head_dim", csa.head_dim, f"{attention}.kv_norm.weight", 0
        yield "csa.q_lora_rank", csa.q_lora_rank, f"{attention}.q_norm.weight", 0
    if config.hyper is not None:
        mixed = config.hyper.streams * config.dim
        yield "hyper.streams * dim", mixed, f"{attention}_residual.mixer.fn", 1
    if config.engram is not None:
        engram = config.engram
        yield "engram.layers, their number,", len(engram.layers), "addresses.primes", 0
        sizes = len(engram.rows_per_head)
        yield "engram.rows_per_head, their number,", sizes, "addresses.primes", 1
        yield "engram.heads", engram.heads, "addresses.primes", 2
        yield "engram.head_dim", engram.head_dim, "tables.0.weight", 1


def encode(value: Any) -> Any:
    """Converts plain Python, numpy arrays and tensors to JSON values that `decode` restores."""
    if isinstance(value, Tensor):
        return {"": "tensor", "value": encode(value.detach().cpu().numpy())}
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"": "array", "dtype": value.dtype.str, "shape": list(value.shape), "data": data}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple):
        return {"": "tuple", "value": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"": "map", "value": [[encode(k), encode(v)] for k, v in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    raise ValueError(
        f"got a {kind}, expected numbers, text, lists, tuples, dicts, arrays or tensors"
    )


def decode(value: Any) -> Any:
    """Restores the input of `encode`; builds only values, whatever the JSON contains."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("")
    if kind == "map":
        return {decode(key): decode(item) for key, item in value["value"]}
    if kind == "tuple":
        return tuple(decode(item) for item in value["value"])
    if kind == "tensor":
        return torch.from_numpy(decode(value["value"]))
    if kind == "array":
        data = np.frombuffer(base64.b64decode(value["data"]), dtype=np.dtype(value["dtype"]))
        return data.reshape(value["shape"]).copy()
    raise ValueError(f"got {kind!r}, expected map, tuple, tensor or array")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor by name; of a DTensor the whole one."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _compare(folder: Path, saved: Shapes, wanted: Shapes) -> None:
    """Raises ValueError for the first name or shape that differs."""
    missing = sorted(wanted.keys() - saved.keys())
    if missing:
        count = f"({len(missing)} missing)"
        raise ValueError(f"{folder}: got no {missing[0]!r} {count}, expected what was saved")
    unknown = sorted(saved.keys() - wanted.keys())
    if unknown:
        count = f"({len(unknown)} unknown)"
        raise ValueError(f"{folder}: got {unknown[0]!r} {count}, expected what was saved")
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise ValueError(f"{folder}: got {name!r} of shape {saved[name]}, expected {shape}")


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns contiguous tensors, each in memory of its own.

    safetensors refuses two names for one tensor, as tied embeddings have.
    """
    packed: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        address = local.untyped_storage().data_ptr()
        packed[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return packed


@contextmanager
def _without_group_warning() -> Iterator[None]:
    """Silences torch's warning that a process without a group is assumed to be the only one."""
    message = r"torch\.distributed is .*assuming the intent is to (save|load)"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, UserWarning)
        yield


@contextmanager
def _first_failure(folder: Path) -> Iterator[None]:
    """Raises the error of the first rank that failed, in one line.

    torch's CheckpointException is no Exception, and its text is the tracebacks of all ranks.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if isinstance(cause, OSError) and cause.errno is not None:
            path = cause.filename or str(folder)
            raise OSError(cause.errno, cause.strerror, path) from None
        kind = type(cause).__name__
        raise RuntimeError(f"{folder}: got {kind} on rank {rank}: {cause}") from cause
