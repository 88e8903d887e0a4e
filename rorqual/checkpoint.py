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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from rorqual import config as configs
from rorqual.io import atomic_write, flush, remove_partial, replace_folder, restore_folders, size_and_sha256
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig
from rorqual.runtime import log
from rorqual.tables import TableConfig, open_tables

DIGEST = "digest.json"
UNDER_WAY = ".unfinished"  # a file that is there until the model is: one of fewer steps may be there meanwhile
BEST = "best"  # beside stepN: the weights alone that had the lowest validation loss
FORMAT = "rorqual-state-1"
# what config.json says beside ModelConfig's fields, so that transformers' Auto classes know a run folder
KIND: Mapping[str, Any] = {"model_type": "rorqual", "architectures": ["RorqualForCausalLM"]}
SPECIAL = {"bos_token_id": "begin_id", "eos_token_id": "end_id", "pad_token_id": "pad_id"}
_MODEL = "model."  # with which the names of a model's tensors begin in a checkpoint


class Damaged(ValueError):
    """A checkpoint that is not what was written; the message names the file."""


def save_state(folder: str | os.PathLike, tensors: Mapping[str, Tensor], values: Any, *, group=None) -> None:
    """Write `tensors` (plain, or DTensors of any placement) and `values` as the checkpoint `folder`.

    Every rank calls it; `values` are the rank's own. The folder appears complete or not at all, and one that was there
    before stays until then. `group`: the process group to speak in, needed off the main thread.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        _write_state(folder, partial, tensors, values, group)
    except BaseException:
        # on a full disk its place is needed
        if _ranks(group)[0] == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_state(folder: Path, partial: Path, tensors: Mapping[str, Tensor], values: Any, group) -> None:
    rank, world = _ranks(group)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(group)
    (partial / f"rank{rank}.json").write_text(json.dumps(encode(values)), encoding="utf-8")
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    with _one_process_is_meant(), _in_a_line(folder):
        save(_packed(tensors), storage_writer=writer, process_group=group, no_dist=world == 1)
    _barrier(group)
    if rank == 0:
        files = {path.name: size_and_sha256(path) for path in sorted(partial.iterdir())}
        digest = {"format": FORMAT, "files": files, "seal": _seal(files)}
        (partial / DIGEST).write_text(json.dumps(digest, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            flush(path)
        replace_folder(partial, folder)
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
    with _one_process_is_meant(), _in_a_line(folder):
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
        if size_and_sha256(path) != expected:
            raise Damaged(f"{path}: got other bytes than were written, expected SHA-256 {expected['sha256'][:12]}..")


def steps(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    """The finished checkpoints `stepN` in the folder, oldest first."""
    found = []
    for path in Path(folder).glob("step*"):
        if (match := re.fullmatch(r"step(\d+)", path.name)) and is_checkpoint(path):
            found.append((int(match[1]), path))
    return sorted(found)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of these tensors, of a DTensor its own part, that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # the least and the largest are found without a second tensor of that size; either is NaN where any number is
        if local.is_floating_point() and local.numel() and not torch.stack(local.detach().aminmax()).isfinite().all():
            return name
    return None


def _check_finite(folder: Path) -> None:
    """Raises Damaged, naming the tensor, where a number in the checkpoint is NaN or infinite."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not_finite({name: file.get_tensor(name)}):
                    raise Damaged(f"{path}: got {name} with NaN or infinite numbers, expected a training that is sound")


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest good checkpoint in the folder, None where there is none at all; others are named in the log.

    Good is one that `verify` finds whole, and whose numbers, the optimizer's among them, are all finite. Raises Damaged
    when there are checkpoints and none is good: starting again would hide it.
    """
    error: Damaged | None = None
    for _, path in reversed(steps(folder)):
        try:
            verify(path)
            _check_finite(path)
            return path
        except Damaged as damage:
            error = damage
            log(f"{damage}; trying the checkpoint before it")
    if error is not None:
        raise Damaged(f"{folder}: every checkpoint is damaged (last: {error}); move the folder away to start again")
    return None


def is_finished(folder: str | os.PathLike) -> bool:
    """Whether the folder holds a model that no training is about to replace."""
    return (Path(folder) / "model.safetensors").is_file() and not (Path(folder) / UNDER_WAY).exists()


def readable(folder: str | os.PathLike) -> bool:
    """Whether the folder is a run whose weights can be read: a finished model, or a checkpoint of any step."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return False
    saved = folder / "checkpoints"
    return (folder / "model.safetensors").is_file() or is_checkpoint(saved / BEST) or bool(steps(saved))


def run_of(folder: str | os.PathLike) -> Path:
    """The folder of the run that a checkpoint RUN/checkpoints/NAME belongs to; any other folder is returned as it is.

    ValueError for a checkpoint that lies elsewhere: what the model is and its tokenizer are told by the run's folder.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        return folder
    run = folder.absolute().parent.parent
    if not folder.is_absolute() and len(folder.parts) > 2:
        run = folder.parent.parent
    if not (run / "config.json").is_file():
        raise ValueError(
            f"{folder}: got a checkpoint without config.json two folders above it, expected it inside its run, as "
            "RUN/checkpoints/stepN (a run of an older version writes config.json when it goes on: rorqual train RUN)"
        )
    return run


def recover(folder: str | os.PathLike) -> None:
    """Finish what a killed writer began: a replaced checkpoint whose successor never came is put back, debris goes.

    For the one process that writes here, before it begins.
    """
    folder = Path(folder)
    restore_folders(folder)
    remove_partial(folder)
    for partial in folder.glob("*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)


def save_model(folder: str | os.PathLike, model: LanguageModel, tokenizer: Any = None) -> None:
    """Write config.json, model.safetensors (last) and, with its own `save`, the tokenizer into the folder.

    transformers' Auto classes open the folder, too. Every rank calls it; rank 0 writes.
    """
    folder = Path(folder)
    state = {name: _whole(tensor).cpu().contiguous() for name, tensor in model.state_dict().items()}
    if _ranks(None)[0] != 0:
        return
    describe_model(folder, model.config, tokenizer)
    if model.config.tied:
        state.pop("head.weight", None)  # safetensors takes no two names for one tensor
    with atomic_write(folder / "model.safetensors") as beside:
        save_file(state, beside, metadata={"format": "pt"})


def describe_model(folder: str | os.PathLike, config: ModelConfig, tokenizer: Any = None) -> None:
    """Write config.json and, with its own `save`, the tokenizer into the folder: all of a model but its weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    special = {} if tokenizer is None else {said: getattr(tokenizer, name) for said, name in SPECIAL.items()}
    configs.save({**KIND, **configs.to_dict(config), **special}, folder / "config.json")


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a run folder, or of one that RorqualForCausalLM saved. ValueError, naming the file, for
    another's."""
    path = Path(folder) / "config.json"
    said = _described(path)
    try:
        if said.get("model_type", KIND["model_type"]) != KIND["model_type"]:
            kind = said["model_type"]
            raise ValueError(f"got model_type {kind!r}, expected a rorqual run")
        own = {name: value for name, value in said.items() if name not in KIND and name not in SPECIAL}
        return configs.from_dict(ModelConfig, said.get("shape", own))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether config.json is that of a run of rorqual's own, and not one that transformers wrote."""
    said = _described(Path(folder) / "config.json")
    return said.get("model_type", KIND["model_type"]) == KIND["model_type"] and "shape" not in said


def _described(path: Path) -> dict[str, Any]:
    """The JSON object in a config.json; ValueError, naming the file, for anything else."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): was it written to the end?") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path}: got {type(said).__name__}, expected a JSON object")
    return said


def load_model(
    folder: str | os.PathLike, device: str | torch.device = "cpu", tables: TableConfig | None = None
) -> LanguageModel:
    """The model of a run's folder, in evaluation mode. `tables`: where Engram's rows are to live.

    Of a run that is not finished it is read from the newest good checkpoint, or from a checkpoint whose own folder
    (RUN/checkpoints/stepN) was given; the log says of which step. ValueError when the folder is neither, Damaged when
    the weights in it are torn, TableError when a table is.
    """
    folder, tables = Path(folder), tables or TableConfig()
    if is_checkpoint(folder):
        return _load_checkpoint(folder, device, tables)
    if (folder / "config.json").is_file() and not is_finished(folder):
        model = _load_newest(folder, device, tables)
        if model is not None:
            return model
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        hint = "expected a run's folder (make one with `rorqual train`)"
        if (folder / "train.json").is_file():
            hint = f"expected a run that has a checkpoint or is finished; go on: rorqual train {folder}"
        raise ValueError(f"{folder}: got no {' and no '.join(missing)} and no checkpoint, {hint}")
    config = read_config(folder)
    if config.engram is None and tables != TableConfig():
        got = f"{tables} for a model without Engram"
        raise ValueError(f"{folder}: got {got}, expected none: it has no rows to keep elsewhere")
    path = folder / "model.safetensors"
    check_sizes(folder, config, stored_shapes(path))
    apart = tables.placement != "device" or tables.folder is not None
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


def _load_newest(folder: Path, device: str | torch.device, tables: TableConfig) -> LanguageModel | None:
    """The model of the newest good checkpoint, else of the best one; None where there is neither.

    Training may put a newer one in the place of the one that is being read; then it is the newer one's turn.
    """
    while True:
        known, best = steps(folder / "checkpoints"), folder / "checkpoints" / BEST
        try:
            try:
                path = latest(folder / "checkpoints")
            except Damaged:
                if not is_checkpoint(best):
                    raise
                path = None
            if path is None and is_checkpoint(best):
                path = best
            return None if path is None else _load_checkpoint(path, device, tables, verified=path.name != BEST)
        except (ValueError, OSError, RuntimeError, SafetensorError):
            if steps(folder / "checkpoints") == known:
                raise


def _load_checkpoint(
    folder: Path, device: str | torch.device, tables: TableConfig, *, verified: bool = False
) -> LanguageModel:
    """The model of one checkpoint, without what the optimizer keeps of it; says of which step it is."""
    run = run_of(folder)
    if tables != TableConfig():
        raise ValueError(f"{folder}: got {tables}, expected none: rows of a checkpoint are read into memory alone")
    if not verified:
        verify(folder)
    config = read_config(run)
    reader = HuggingFaceStorageReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata.items()
    sizes = {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
    saved = {name: size for name, size in sizes.items() if name.startswith(_MODEL)}
    check_sizes(run, config, {name.removeprefix(_MODEL): size for name, size in saved.items()})
    model = LanguageModel(config, seed=None)
    wanted = {f"{_MODEL}{name}": torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    if absent := sorted(name for name in wanted.keys() - saved.keys() if name.startswith(f"{_MODEL}tables.")):
        raise ValueError(
            f"{folder}: got a checkpoint without {absent[0].removeprefix(_MODEL)}, whose rows learn on the disk and "
            f"go on changing, expected rows in memory; finish the run to read it: rorqual train {run}"
        )
    _compare(folder, saved, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    with _one_process_is_meant(), _in_a_line(folder):
        load(dict(wanted), storage_reader=reader, no_dist=True)
    # not filled in place: Engram derives from its canonical map when it is loaded
    model.load_state_dict({name.removeprefix(_MODEL): tensor for name, tensor in wanted.items()})
    log(_where_read(run, folder))
    return model.to(device).eval()


def _where_read(run: Path, folder: Path) -> str:
    """Which step of how many a checkpoint is of, in a line."""
    path = run / "train.json"
    steps_wanted = json.loads(path.read_text(encoding="utf-8")).get("steps") if path.is_file() else None
    of = "" if steps_wanted is None else f" of {steps_wanted:,}"
    if folder.name == BEST:
        values = decode(json.loads((folder / "rank0.json").read_text(encoding="utf-8")))
        loss = f"validation loss {values['validation_loss']:.4f}"
        return f"{run}: the best checkpoint, read at step {values['step']:,}{of} ({loss})"
    step = re.sub(r"\D", "", folder.name)
    named = f"step {int(step):,}{of}" if step else folder.name
    return f"{run}: {'a checkpoint' if is_finished(run) else 'not finished'}, read at {named}"


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


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without DCP's warning that it takes a process without a group for the only one: here it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.distributed is .*assuming the intent is to (save|load)", UserWarning)
        yield


@contextmanager
def _in_a_line(folder: Path) -> Iterator[None]:
    """Raises what went wrong on one rank: DCP's own error is no Exception, and its text is the tracebacks of all."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if isinstance(cause, OSError) and cause.errno is not None:
            raise OSError(cause.errno, cause.strerror, cause.filename or str(folder)) from None
        raise RuntimeError(f"{folder}: got {type(cause).__name__} on rank {rank}: {cause}") from cause


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
