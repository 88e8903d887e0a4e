"""A run's state in -> files that hold it whole or not at all, and the state again, out.

    stepN/rank*.json             everything but tensors: JSON, with tuples and arrays spelled out
    stepN/*.safetensors          tensors, by torch.distributed.checkpoint, from one process or many
    stepN/digest.json            size and SHA-256 of each of these files

A checkpoint is written beside its place, flushed to the disk and renamed, so that a process killed at any moment leaves
the one before it. It is measured against its digest before use. Nothing in it is ever executed: only JSON and
safetensors are opened, and pickles (`.pt`, `.metadata`) that lie in the folder are not looked at.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from rorqual import config as configs
from rorqual.model import LanguageModel, ModelConfig
from rorqual.runtime import log
from rorqual.storage import StorageConfig, open_tables

DIGEST = "digest.json"
FORMAT = "rorqual-state-1"


class Damaged(ValueError):
    """A checkpoint that is not what was written; the message names the file."""


def save_state(folder: str | os.PathLike, tensors: Mapping[str, Tensor], values: Any, *, group=None) -> None:
    """Write `tensors` (plain, or DTensors of any placement) and `values` as the checkpoint `folder`.

    Every rank calls it; `values` are the rank's own. The folder appears complete or not at all, and one that was there
    before stays until then. `group`: the process group to speak in, needed off the main thread.
    """
    folder, (rank, world) = Path(folder), _ranks(group)
    partial = folder.with_name(folder.name + ".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(group)
    (partial / f"rank{rank}.json").write_text(json.dumps(encode(values)), encoding="utf-8")
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _one_process_is_meant():
        save(_packed(tensors), storage_writer=writer, process_group=group, no_dist=world == 1)
    _barrier(group)
    if rank == 0:
        files = {path.name: _measure(path) for path in sorted(partial.iterdir())}
        digest = {"format": FORMAT, "files": files, "seal": _seal(files)}
        (partial / DIGEST).write_text(json.dumps(digest, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        _put_in_place(partial, folder)
    _barrier(group)


def load_state(folder: str | os.PathLike, tensors: Mapping[str, Tensor], *, group=None) -> Any:
    """Fill `tensors` in place from the checkpoint `folder` and return this rank's values (rank 0's where it has none).

    Raises Damaged when the files are not those that were written, ValueError when other names or shapes were asked for
    than were saved.
    """
    folder, (rank, world) = Path(folder), _ranks(group)
    _on_first(lambda: verify(folder), group)
    reader = HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata.items()
    saved = {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
    _compare(folder, saved, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with _one_process_is_meant():
        load(dict(tensors), storage_reader=reader, process_group=group, no_dist=world == 1)
    own = folder / f"rank{rank}.json"
    return decode(json.loads((own if own.exists() else folder / "rank0.json").read_text(encoding="utf-8")))


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a checkpoint that was finished; `verify` says whether it is still good."""
    return (Path(folder) / DIGEST).is_file()


def verify(folder: str | os.PathLike) -> None:
    """Raises Damaged, naming the file, unless the folder's files are those its digest names, byte for byte."""
    folder = Path(folder)
    try:
        digest = json.loads((folder / DIGEST).read_text(encoding="utf-8"))
        files = dict(digest["files"])
        found, seal = digest["format"], digest["seal"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / DIGEST}: got {type(error).__name__}, expected the digest of a checkpoint") from error
    if found != FORMAT:
        raise Damaged(f"{folder / DIGEST}: got format {found!r}, expected {FORMAT!r}")
    if seal != _seal(files):
        raise Damaged(f"{folder / DIGEST}: got other text than was written, expected seal {str(seal)[:12]}..")
    strangers = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    if strangers:
        raise Damaged(f"{folder / min(strangers)}: got a file that the digest does not name, expected none")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path}: got no file, expected {expected['bytes']} bytes")
        if path.stat().st_size != expected["bytes"]:
            raise Damaged(f"{path}: got {path.stat().st_size} bytes, expected {expected['bytes']}: it is cut short")
        if _measure(path) != expected:
            raise Damaged(f"{path}: got other bytes than were written, expected SHA-256 {expected['sha256'][:12]}..")


def steps(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    """The finished checkpoints `stepN` in the folder, oldest first."""
    found = []
    for path in Path(folder).glob("step*"):
        if (match := re.fullmatch(r"step(\d+)", path.name)) and is_checkpoint(path):
            found.append((int(match[1]), path))
    return sorted(found)


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest good checkpoint in the folder, None where there is none at all; damaged ones are named in the log.

    Raises Damaged when there are checkpoints and every one is damaged: starting again would hide it.
    """
    error: Damaged | None = None
    for _, path in reversed(steps(folder)):
        try:
            verify(path)
            return path
        except Damaged as damage:
            error = damage
            log(f"{damage}; trying the checkpoint before it")
    if error is not None:
        raise Damaged(f"{folder}: every checkpoint is damaged (last: {error}); move the folder away to start again")
    return None


def recover(folder: str | os.PathLike) -> None:
    """Finish what a killed writer began: a replaced checkpoint whose successor never came is put back, debris goes.

    For the one process that writes here, before it begins.
    """
    folder = Path(folder)
    for replaced in folder.glob("*.replaced"):
        place = replaced.with_suffix("")
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(place)
    for partial in folder.glob("*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)


def save_model(folder: str | os.PathLike, model: LanguageModel, tokenizer: Any = None) -> None:
    """Write config.json, model.safetensors (last) and, with its own `save`, the tokenizer into the folder.

    Every rank calls it; rank 0 writes.
    """
    folder = Path(folder)
    state = {name: _whole(tensor).cpu().contiguous() for name, tensor in model.state_dict().items()}
    if _ranks(None)[0] != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    configs.save(model.config, folder / "config.json")
    if model.config.tied:
        state.pop("head.weight", None)  # safetensors takes no two names for one tensor
    partial = folder / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    # safetensors lets nobody else read it; it shall be as open as any file made here
    partial.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))
    _flush(partial)
    partial.replace(folder / "model.safetensors")
    _flush(folder)


def load_model(
    folder: str | os.PathLike, device: str | torch.device = "cpu", tables: StorageConfig | None = None
) -> LanguageModel:
    """The model of a folder that `save_model` wrote, in evaluation mode. `tables`: where Engram's rows are to live.

    ValueError when it is not such a folder, Damaged when the weights in it are torn, TableError when a table is.
    """
    folder, tables = Path(folder), tables or StorageConfig()
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: got no {' and no '.join(missing)}, expected a finished run's folder")
    config = configs.load(ModelConfig, folder / "config.json")
    path = folder / "model.safetensors"
    check_sizes(folder, config, stored_shapes(path))
    apart = tables.home != "device" or tables.folder is not None
    state = _weights(path, str(device), without="tables." if apart else None)
    apart = apart or ("tables.0.weight" not in state and (folder / "tables").is_dir())
    if config.tied:
        state.setdefault("head.weight", state["embed.weight"])
    held = open_tables(folder, len(config.engram.layers) if config.engram else 0, tables) if apart else None
    with torch.device(device):
        model = LanguageModel(config, seed=None, tables=held)  # Engram takes the canonical map from the state
    own = {name: value for name, value in model.state_dict().items() if apart and name.startswith("tables.")}
    state |= own
    _compare(folder, {k: tuple(v.shape) for k, v in state.items()}, _shapes(model))
    model.load_state_dict(state)
    return model.to(device).eval()


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a safetensors file, of which only the header is read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise Damaged(f"{path}: got a torn file ({error}), expected safetensors") from error


def check_sizes(folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a config whose sizes are not the weights', before a model of these sizes is built.

    Sizes that decide little of a model are left to the comparison of every tensor, once it is.
    """

    def count(pattern: str) -> int:
        return len({match[1] for name in shapes if (match := re.match(pattern, name))})

    def expect(name: str, got: int, axis: int, tensor: str) -> None:
        shape = shapes.get(tensor, ())
        if axis < len(shape) and got != shape[axis]:
            raise ValueError(f"{folder}: config.json: {name}: got {got}, expected {shape[axis]} as {tensor} has")

    depth = config.mtp.depth if config.mtp is not None else 0
    for name, got, kind in (("layers", config.layers, "blocks"), ("mtp.depth", depth, "mtp")):
        if got != (stored := count(rf"{kind}\.(\d+)\.")):
            raise ValueError(f"{folder}: config.json: {name}: got {got}, expected {stored} as the weights have")
    expect("vocabulary", config.vocabulary, 0, "embed.weight")
    expect("dim", config.dim, 1, "embed.weight")
    expect("dense_width", config.dense_width, 0, "blocks.0.ffn.gate_proj.weight")
    if config.moe is not None:
        ffn = f"blocks.{config.moe.first_dense}.ffn"
        expect("moe.routed", config.moe.routed, 0, f"{ffn}.experts.down")
        expect("moe.width", config.moe.width, 1, f"{ffn}.experts.down")
        if config.moe.shared:
            expect("moe.shared, in widths,", config.moe.shared_hidden, 0, f"{ffn}.shared.gate_proj.weight")
    attention = "blocks.0.attention"
    if config.mla is not None:
        mla = config.mla
        expect("mla.kv_lora_rank", mla.kv_lora_rank, 0, f"{attention}.kv_a_layernorm.weight")
        if mla.q_lora_rank is not None:
            expect("mla.q_lora_rank", mla.q_lora_rank, 0, f"{attention}.q_a_layernorm.weight")
        expect("mla.heads * mla.value_dim", mla.heads * mla.value_dim, 1, f"{attention}.o_proj.weight")
        keys = mla.heads * (mla.nope_dim + mla.value_dim)
        expect("mla.heads * (nope_dim + value_dim)", keys, 0, f"{attention}.kv_b_proj.weight")
    if config.gqa is not None:
        gqa = config.gqa
        for heads, projection in (("heads", "q_proj"), ("kv_heads", "k_proj")):
            got = getattr(gqa, heads) * gqa.head_dim
            expect(f"gqa.{heads} * gqa.head_dim", got, 0, f"{attention}.{projection}.weight")
    if config.hyper is not None:
        mixed = config.hyper.streams * config.dim
        expect("hyper.streams * dim", mixed, 1, f"{attention}_site.mixer.fn")
    if config.engram is not None:
        engram = config.engram
        for axis, (name, got) in enumerate(
            (
                ("engram.layers, their number,", len(engram.layers)),
                ("engram.rows_per_head, their number,", len(engram.rows_per_head)),
                ("engram.heads", engram.heads),
            )
        ):
            expect(name, got, axis, "addresses.primes")
        expect("engram.head_dim", engram.head_dim, 1, "tables.0.weight")
        # a head has a prime number of rows, which is found by trial: at least so many as the config says
        least, (rows, *_) = sum(engram.rows_per_head) * engram.heads, shapes.get("tables.0.weight", (None,))
        if rows is not None and least > rows:
            wanted = f"{engram.rows_per_head}, {least} rows or more,"
            raise ValueError(f"{folder}: config.json: engram.rows_per_head: got {wanted} expected {rows} in all")


def _weights(path: Path, device: str, without: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, those whose names begin with `without` left where they are."""
    try:
        with safe_open(path, "pt", device=device) as file:
            names = [name for name in file.keys() if without is None or not name.startswith(without)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise Damaged(f"{path}: got a torn file ({error}), expected safetensors") from error


def encode(value: Any) -> Any:
    """Plain Python, numpy arrays and tensors -> JSON values that `decode` turns back, to the last bit."""
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
        return {"": "map", "value": [[encode(key), encode(item)] for key, item in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"got a {type(value).__name__}, expected numbers, text, lists, tuples, dicts, arrays or tensors")


def decode(value: Any) -> Any:
    """The inverse of `encode`. It builds values and nothing else, whatever the file says."""
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


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _compare(folder: Path, saved: Mapping[str, tuple], wanted: Mapping[str, tuple]) -> None:
    """Says which name or shape differs, before anything is read."""
    if missing := sorted(wanted.keys() - saved.keys()):
        raise ValueError(f"{folder}: got no {missing[0]!r} ({len(missing)} missing), expected what was saved")
    if unknown := sorted(saved.keys() - wanted.keys()):
        raise ValueError(f"{folder}: got {unknown[0]!r} ({len(unknown)} unknown), expected what was saved")
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise ValueError(f"{folder}: got {name!r} of shape {saved[name]}, expected {shape}")


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without DCP's warning that it takes a process without a group for the only one: here it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.distributed is .*assuming the intent is to (save|load)", UserWarning)
        yield


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and each in memory of its own: safetensors refuses two names for one tensor (tied embeddings)."""
    packed, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = local.untyped_storage().data_ptr()
        packed[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return packed


def _seal(files: Mapping[str, Any]) -> str:
    """The digest's own digest, so that damage to it is not blamed on the files it names."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Until the bytes, or the folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename; a folder that is there already waits under another name until its successor is in place."""
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    partial.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _ranks(group) -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def _barrier(group) -> None:
    if _ranks(group)[1] > 1:
        dist.barrier(group=group)


def _on_first(check, group) -> None:
    """Run the check on rank 0 only and raise what it raised on every rank, so that all go on or none."""
    rank, world = _ranks(group)
    error: list[Exception | None] = [None]
    if rank == 0:
        try:
            check()
        except Damaged as damage:
            error[0] = damage
    if world > 1:
        dist.broadcast_object_list(error, group_src=0, group=group)
    if error[0] is not None:
        raise error[0]
