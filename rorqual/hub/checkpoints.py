"""Reads folders of published models into a LanguageModel, and writes such folders.

    x.weight float8 e4m3, x.weight_scale_inv [R/128, C/128]
        ->   weight * its block's scale             (formats.py has all of these)
    table.shard_0.weight float8 e4m3, table.weight_scale [1]
        ->   weight * the scale of the table
    Engram's rows
        ->   a table of ours, or where they are, read by position

The names are those of a family (families.py), whose table of places is used in both directions.
Weights are read file by file, tensor by tensor, into the model's own memory. JSON and safetensors
only: pickles are never opened, and code in the folder is never read.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rorqual import runtime
from rorqual.data.tokenizer import Tokenizer
from rorqual.hub.families import Family, family_for, family_of
from rorqual.hub.fields import mtp_layers, scale_block
from rorqual.hub.formats import (
    E4M3,
    PACKED,
    QUANTISED,
    ROWS,
    Block,
    decode,
    decoded_shape,
    scale_shape,
)
from rorqual.hub.places import AnyPlace, StateSlice, fill
from rorqual.io import atomic_write, write_text
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.tables import Table, TableConfig, hot_rows
from rorqual.tables.tensor_rows import Source, TensorRows
from rorqual.tables.thread import BackgroundThread

INTEGERS = ("I64", "I32")  # dtypes of token ids' experts
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3")  # dtypes of weights, as safetensors names them
TABLE_SCALE = ".weight_scale"  # of a table whose shards share one scale
# Bytes that are read of a mapped file before it is closed: until then they count as memory.
WINDOW = 64 << 20


class Files:
    """The weight files of a folder: the file, shape and dtype of each tensor.

    ValueError if a file is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.where = {}
        self.shapes = {}
        self.dtypes = {}
        self._stored: dict[str, str] = {}  # name in the file of each tensor that is renamed
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for path in self._paths():
            tensors = _handle(path)
            for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = tensors.get_slice(name)
                self.where[name] = path
                self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()

    def _paths(self) -> list[Path]:
        """Returns the weight files: model.safetensors, or all that the index names.

        ValueError without either, or where the index names a file that is not in the folder.
        """
        whole = self.folder / "model.safetensors"
        index = self.folder / "model.safetensors.index.json"
        if whole.is_file():
            return [whole]
        if not index.is_file():
            beside = " (pickled weights are never opened)" if any(self.folder.glob("*.bin")) else ""
            raise ValueError(
                f"{self.folder}: no weights, expected {whole.name} or {index.name}{beside}"
            )
        weight_map = _json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise ValueError(f"{index}: no weight_map, expected the file of every tensor")
        names = sorted(set(weight_map.values()))
        if lost := [
            name for name in names if Path(name).name != name or not (self.folder / name).is_file()
        ]:
            raise ValueError(
                f"{self.folder}: {index.name} names {_some(lost)}, which the folder does not hold"
            )
        return [self.folder / name for name in names]

    def tensor(self, name: str) -> Tensor:
        """Returns one stored tensor, in the mapped memory of its file.

        Only the file that was read last stays open.
        """
        path = self.where[name]
        if self._open is None or self._open[0] != path or self._read > WINDOW:
            self.close()
            self._open = path, _handle(path)
        tensor = self._open[1].get_tensor(self._stored.get(name, name))
        self._read += _bytes(tensor)
        return tensor

    def rename(self, canonical: Callable[[str], str]) -> None:
        """Calls every tensor by what `canonical` makes of its name in the files."""
        names = {canonical(name): name for name in self.where}
        if len(names) < len(self.where):
            twice = sorted(name for name in self.where if names[canonical(name)] != name)
            others = ", ".join(names[canonical(name)] for name in twice[:3])
            got = f"{', '.join(twice[:3])} beside {others}"
            raise ValueError(f"{self.folder}: got {got}, expected each tensor once")
        self._stored = {name: stored for name, stored in names.items() if name != stored}
        tables: tuple[dict[str, Any], ...] = self.where, self.shapes, self.dtypes
        for table in tables:
            values = {name: table[stored] for name, stored in names.items()}
            table.clear()
            table.update(values)

    def close(self) -> None:
        """Closes the file that is open; the next `tensor` opens it again."""
        self._open = None
        self._read = 0

    def source(self, name: str, first_row: int) -> Source:
        """Returns where a tensor of rows is stored; it begins with row `first_row` of its table."""
        return Source(self.where[name], self._stored.get(name, name), first_row)

    def scale_of(self, name: str) -> str | None:
        """Returns the name of a tensor's scales, by V3, V4 or for a table; None without any."""
        candidates = (
            f"{name}_scale_inv",
            f"{name.removesuffix('.weight')}.scale",
            re.sub(r"\.shard_\d+\.weight$", TABLE_SCALE, name),
        )
        return next((scale for scale in candidates if scale in self.where and scale != name), None)

    def block_of(self, name: str, described: Block | None) -> Block | None:
        """Returns the rows and columns of a tensor that share a scale.

        They are what config.json describes for names as V3's; V4's files have several, of which one
        has the shape of the stored scales.
        """
        scale = self.scale_of(name)
        if scale is None or scale.endswith("_scale_inv"):
            return described
        if math.prod(self.shapes[scale]) == 1:
            return None
        shape = decoded_shape(self.shapes[name], self.dtypes[name])
        blocks = [ROWS, *([] if described is None else [described]), (32, 32), (128, 128)]
        fitting = (block for block in blocks if scale_shape(shape, block) == self.shapes[scale])
        return next(fitting, described)


def _handle(path: Path) -> Any:
    """Opens a safetensors file. ValueError if it cannot be read."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}), is it complete?") from error


def _json(path: Path) -> dict[str, Any]:
    """Reads a file as a JSON object. ValueError, with its path, for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}), is it complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected a JSON object")
    return content


def _some(names: list[str], limit: int = 8) -> str:
    """Joins the first `limit` names with commas, and says how many more there are."""
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tables: TableConfig | None = None,
    cache_formats: Literal["none", "published"] | None = None,
) -> LanguageModel:
    """Loads a folder of a published model, or of transformers' save_pretrained of one.

    dtype None keeps the stored one (float8 becomes bfloat16); router biases are always float32.
    Engram's tables go to the placement that `tables` names; on a disk they stay in the folder's
    files, where their rows are read by position. `cache_formats` replaces that of CSA2Config.
    ValueError, with the names, for another architecture, missing files, and tensors that are
    missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    description = _json(folder / "config.json")
    files = Files(folder)
    family = family_of(description)
    files.rename(family.canonical)
    config = family.config_of(description, files.where)
    if cache_formats is not None:
        config = _with_cache_formats(config, cache_formats)
    block = scale_block(description)
    if config.engram is None and tables not in (None, TableConfig()):
        raise ValueError(
            f"{folder}: got {tables} for a model without Engram, expected none, or a run of "
            "rorqual's own, whose tables can lie elsewhere"
        )
    _check_sizes(files, config, family)
    canonical_map = _canonical_map(folder, config, family, description)
    apart = tables is not None and tables.placement != "device"
    try:
        with torch.device("meta"):
            model = LanguageModel(config, canonical_map, seed=None)
    except (RuntimeError, OverflowError, TypeError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(
            f"{folder}: config.json: no model has such sizes, "
            f"expected those of the weights: {message}"
        ) from error
    _check(files, config, family, _state(model), block)
    if apart and tables is not None:
        model.tables = nn.ModuleList(open_published(files, config, family, tables))
    dtype = dtype or _stored_dtype(files, family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if config.tied:
        model.head.weight = model.embed.weight
    places = {
        name: tensor_place
        for name, tensor_place in family.places(config).items()
        if not (apart and tensor_place.name.startswith("tables."))
    }
    _fill(_state(model), files, (places, family.copies(config)), block)
    _report(files, config, family)
    return model.eval()


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the config of a published folder, and logs what `load` would not read.

    Of the weights only the headers are read: they decide which blocks of MTP there are. A
    config.json without weights, or the path of one, is enough; then its fields decide.
    """
    folder = Path(folder)
    file = folder if folder.is_file() else folder / "config.json"
    description = _json(file)
    family = family_of(description)
    if file == folder or not any(folder.glob("model.safetensors*")):
        config = family.config_of(description)
        count = mtp_layers(description.get("text_config") or description)
        if count and config.mtp is None:
            runtime.log(f"{file}: {count} layers of multi-token prediction are not counted")
        return config
    files = Files(folder)
    files.rename(family.canonical)
    config = family.config_of(description, files.where)
    _check_sizes(files, config, family)
    _report(files, config, family)
    return config


def _state(model: LanguageModel) -> dict[str, Tensor]:
    """Returns the state dict, and the buffers that it leaves out."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def _with_cache_formats(config: ModelConfig, wanted: Literal["none", "published"]) -> ModelConfig:
    """Returns the config with the rounding of CSA2's caches replaced. ValueError without CSA2."""
    if config.csa2 is None:
        raise ValueError(
            f"cache_formats: got {wanted!r} for a model without csa2, expected none: its caches "
            "have the model's dtype"
        )
    return replace(config, csa2=replace(config.csa2, cache_formats=wanted))


def _canonical_map(
    folder: Path, config: ModelConfig, family: Family, description: Mapping[str, Any]
) -> np.ndarray | None:
    """Returns the map from raw to canonical ids of the folder's tokenizer, for Engram.

    ValueError if there is none, or if it has another number of canonical ids than the config says.
    """
    if config.engram is None or not config.engram.canonical:
        return None
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json, expected the tokenizer whose canonical ids Engram hashes"
        )
    canonical_map = Tokenizer.load(folder).canonical_map()
    count_of = getattr(family, "canonical_count", None)
    expected = None if count_of is None else count_of(description)
    if expected not in (None, got := int(canonical_map.max()) + 1):
        raise ValueError(
            f"{folder}: tokenizer.json: got {got} canonical ids, expected the {expected} of "
            "config.json: Engram's hash depends on their number"
        )
    return canonical_map


def open_published(
    files: Files, config: ModelConfig, family: Family, tables: TableConfig
) -> list[Table]:
    """Opens Engram's tables in the files of a published folder, and copies them if asked to.

    One thread fetches for all of them. TableError for files that are not sound.
    """
    if config.engram is None:
        return []
    by_table: dict[str, list[tuple[int, str]]] = {}
    for name, tensor_place in family.places(config).items():
        if isinstance(tensor_place, StateSlice) and tensor_place.name.startswith("tables."):
            shard = tensor_place.slices[0] if tensor_place.slices else slice(None)
            assert isinstance(shard, slice)
            by_table.setdefault(tensor_place.name, []).append((shard.start or 0, name))
    thread = BackgroundThread()
    opened = []
    hot = hot_rows(Path(tables.hot)) if tables.hot is not None else {}
    fetching: dict[str, Any] = {"prefetch": tables.prefetch, "thread": thread}
    for n, rows in enumerate(row_totals(config.engram)):
        shards = sorted(by_table[f"tables.{n}.weight"])
        file = _rows_of(files, [(name, first) for first, name in shards], rows)
        if tables.placement == "disk":
            rows_in_memory = hot.get(str(n))
            opened.append(
                Table.of_rows(
                    file, cache_bytes=tables.hot_bytes, cached_rows=rows_in_memory, **fetching
                )
            )
        else:
            values = file.stored(0, rows)
            file.close()
            opened.append(Table.of_values(values, **fetching))
    return opened


def _rows_of(files: Files, shards: list[tuple[str, int]], rows: int) -> TensorRows:
    """Opens the tensors of one table, each with the number of its first row."""
    sources = [files.source(name, first) for name, first in shards]
    scales = [(files.scale_of(name), first) for name, first in shards]
    names = [name for name, _ in scales if name is not None]
    if not names:
        return TensorRows(sources, rows=rows)
    if all(math.prod(files.shapes[name]) == 1 for name in names):
        values = {files.tensor(name).float().item() for name in names}
        files.close()
        if len(values) == 1:
            return TensorRows(sources, scale=values.pop(), rows=rows)
        raise ValueError(f"{names[0]}: got {len(values)} scales of one table, expected one")
    of_rows = [files.source(name, first) for name, first in scales if name is not None]
    return TensorRows(sources, of_rows, rows=rows)


def _report(files: Files, config: ModelConfig, family: Family) -> None:
    """Logs in one line which parts of the folder are not read, and how large they are."""
    needed = family.places(config)
    scales = {files.scale_of(name) for name in files.where}
    sizes: Counter[str] = Counter()
    layers: dict[str, set[str]] = {}
    for name in files.where:
        start = next((start for start in family.PARTS if name.startswith(start)), None)
        if start is None or name in needed or name in scales:
            continue
        # Beside MTP that is loaded these are no draft.
        label = start.rstrip(".") if start == "mtp." and config.mtp else family.PARTS[start]
        number = re.match(r"(\d+)\.", name.removeprefix(start))
        layers.setdefault(label, set()).update(number.groups() if number else ())
        packed = files.scale_of(name) is not None
        shape = files.shapes[name]
        shape = decoded_shape(shape, files.dtypes[name]) if packed else shape
        sizes[label] += math.prod(shape)
    if not sizes:
        return
    parts = []
    for label, size in sorted(sizes.items()):
        count = len(layers[label])
        some = f", {count} layer{'s' * (count > 1)}" if count else ""
        parts.append(f"{label}{some}, {size:,} parameters")
    runtime.log(f"{files.folder}: skipped: {'; '.join(parts)}")


def _stored_dtype(files: Files, family: Family) -> torch.dtype:
    """Returns the dtype of the stored embedding; bfloat16 if that has 8 bits a value."""
    dtype = files.tensor(family.EMBEDDING).dtype
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _check_sizes(files: Files, config: ModelConfig, family: Family) -> None:
    """Refuses a config larger than the folder, before a model or its tensors' names are made."""

    def count(pattern: str) -> int:
        return len({match[1] for name in files.where if (match := re.search(pattern, name))})

    depth = config.mtp.depth if config.mtp is not None and family.SIZES.mtp_counts else 0
    largest = {"num_hidden_layers": (config.layers, count(family.SIZES.layer) - depth)}
    if config.moe is not None:
        routers = [
            shape[0]
            for name, shape in files.shapes.items()
            if name.endswith(family.SIZES.router) and shape
        ]
        largest["n_routed_experts"] = (
            config.moe.routed,
            max(routers, default=count(family.SIZES.expert)),
        )
    embed = files.shapes.get(family.EMBEDDING, ())
    # Where the config has fewer than are stored, `_check` names the tensors that are left over.
    wrong = {name: sizes for name, sizes in largest.items() if sizes[0] > sizes[1]}
    ours = ("vocab_size", config.vocab_size), ("hidden_size", config.dim)
    equal = {name: (got, size) for (name, got), size in zip(ours, embed, strict=False)}
    wrong |= {name: sizes for name, sizes in equal.items() if sizes[0] != sizes[1]}
    for name, (got, stored) in wrong.items():
        raise ValueError(
            f"{files.folder}: tensors disagree with config.json. "
            f"{name}: got {got}, expected {stored} as they have"
        )


def _check(
    files: Files,
    config: ModelConfig,
    family: Family,
    state: Mapping[str, Tensor],
    block: Block | None,
) -> None:
    """Raises ValueError with every disagreement between the stored tensors and the config."""
    needed = family.places(config)
    all_places = {**needed, **family.copies(config)}
    asked = {*needed, *(files.scale_of(name) for name in needed if name in files.where)}
    read = {name for name in files.where if name in asked or not family.skipped(name)}
    scales = {
        files.scale_of(name) or f"{name}_scale_inv": name
        for name in read
        if files.dtypes[name] == E4M3 or (files.dtypes[name] in PACKED and files.scale_of(name))
    }
    # An empty tensor (of no shared expert) has nothing to check.
    stored = {name for name in read if 0 not in files.shapes[name]}
    expected = {
        name: tuple(tensor_place.of(state).shape) for name, tensor_place in all_places.items()
    }
    shapes = {name: files.shapes[name] for name in stored}
    for scale, name in scales.items():
        shapes[name] = decoded_shape(files.shapes[name], files.dtypes[name])
        if scale in stored:
            expected[scale] = scale_shape(shapes[name], files.block_of(name, block))
    # One value, in whatever shape.
    whole = {scale for scale in scales if block is None or scale.endswith(TABLE_SCALE)}
    floats = {*FLOATS, *(files.dtypes[name] for name in scales.values())}
    problems = {
        "missing": sorted((needed.keys() | scales.keys()) - stored),
        "not in this architecture": sorted(stored - all_places.keys() - scales.keys()),
        "misshapen": [
            f"{name} {shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in stored
            and shapes[name] != shape
            and not (name in whole and set(shapes[name]) <= {1})
        ],
        f"of a dtype other than {', '.join(FLOATS)}": [
            f"{name} {files.dtypes[name]}"
            for name in all_places
            if name in stored
            and files.dtypes[name]
            not in (floats if name in scales.values() else _dtypes(all_places[name], state))
        ],
    }
    if any(problems.values()):
        message = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{files.folder}: tensors disagree with config.json. {message}")


def _dtypes(tensor_place: AnyPlace, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Returns the stored dtypes that a tensor of ours is read from."""
    return FLOATS if state[tensor_place.name].is_floating_point() else INTEGERS


@torch.no_grad()
def _fill(
    state: Mapping[str, Tensor],
    files: Files,
    tables: tuple[Mapping[str, AnyPlace], Mapping[str, AnyPlace]],
    block: Block | None,
) -> None:
    """Copies the tensors of the first table, and checks those of the second, which repeat some."""
    table, repeated = tables
    for name in sorted(table, key=lambda name: files.where[name]):
        fill(table[name], state, _read(files, name, block))
    for name, tensor_place in repeated.items():
        if name in files.where and not torch.equal(
            tensor_place.of(state).cpu(), _read(files, name, block).to(tensor_place.of(state).dtype)
        ):
            raise ValueError(
                f"{files.folder}: {name} differs from what it should be a copy of, "
                f"{tensor_place.name}"
            )
    files.close()


def _read(files: Files, name: str, block: Block | None) -> Tensor:
    """Returns a stored tensor, multiplied by its scales if it is quantised."""
    scale = files.scale_of(name)
    if scale is None or files.dtypes[name] not in QUANTISED:
        return files.tensor(name)
    return decode(files.tensor(name), files.tensor(scale), files.block_of(name, block))


def export(
    model: LanguageModel, folder: str | Path, *, shard_bytes: int = 4 << 30, **fields: Any
) -> None:
    """Writes a folder that the class of transformers for this architecture loads with equal logits.

    `fields` are added to config.json unchanged (eos_token_id,
    max_position_embeddings ...). ValueError where the model has a part that the format cannot
    express, with its name, or where the folder already contains a model.
    """
    folder = Path(folder)
    config = model.config
    family = family_for(config)
    if model.addresses is not None and model.addresses.config.canonical:
        fields.setdefault("canonical_ids", int(model.addresses.canonical_map.max()) + 1)
    description = family.published(
        config, dtype=str(model.embed.weight.dtype).removeprefix("torch."), **fields
    )
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        raise ValueError(f"{folder}: already holds a model, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    state = {**_state(model), "": model.embed.weight.new_empty(0, config.dim)}
    # Where the head is the embedding, a folder holds it once.
    copies = {
        name: tensor_place
        for name, tensor_place in family.copies(config).items()
        if not config.tied or tensor_place.name not in ("embed.weight", "head.weight")
    }
    table = {**family.places(config), **copies, **family.hollow(config)}
    shards = list(_shards(state, table, shard_bytes))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        where |= dict.fromkeys(names, file)
        tensors = {
            name: table[name].of(state).detach().cpu().clone(memory_format=torch.contiguous_format)
            for name in names
        }
        with atomic_write(folder / file) as beside:
            save_file(tensors, beside, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(table[name].of(state)) for name in table)},
            "weight_map": where,
        }
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", description)


def _write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _bytes(tensor: Tensor) -> int:
    """Returns the bytes that a tensor's values take."""
    return tensor.numel() * tensor.element_size()


def _shards(
    state: Mapping[str, Tensor], table: Mapping[str, AnyPlace], limit: int
) -> Iterator[list[str]]:
    """Yields the names of the table, in order, in groups of at most `limit` bytes."""
    names: list[str] = []
    size = 0
    for name, tensor_place in table.items():
        more = _bytes(tensor_place.of(state))
        if names and size + more > limit:
            yield names
            names = []
            size = 0
        names.append(name)
        size += more
    yield names
