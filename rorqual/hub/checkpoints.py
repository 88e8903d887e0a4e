"""Reads folders of published models into a LanguageModel, and writes such folders.

    x.weight float8 e4m3, x.weight_scale_inv [R/128, C/128]
        ->   weight * its block's scale
    table.shard_0.weight float8 e4m3, table.weight_scale [1]
        ->   weight * the scale of the table

The names are those of a family (families.py), whose table of places is used in both directions.
Weights are read file by file, tensor by tensor, into the model's own memory. JSON and safetensors
only: pickles are never opened, and code in the folder is never read.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.hub.families import Family, family_for, family_of
from rorqual.hub.places import Place
from rorqual.io import atomic_write, write_text
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3")  # dtypes of weights, as safetensors names them
TABLE_SCALE = ".weight_scale"  # of a table whose shards share one scale
TEXT_MODEL = "model.language_model."  # prefix of the text model's tensors in a multimodal folder
# Bytes that are read of a mapped file before it is closed: until then they count as memory.
WINDOW = 64 << 20


class Files:
    """The weight files of a folder: the file, shape and dtype of each tensor.

    The text model of a multimodal folder is named as if it were alone. ValueError if a file is
    missing.
    """

    def __init__(self, folder: Path):
        self.folder, self.where, self.shapes, self.dtypes = folder, {}, {}, {}
        self._stored: dict[str, str] = {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for path in self._paths():
            tensors = _handle(path)
            for stored in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor, name = tensors.get_slice(stored), stored
                if stored.startswith(TEXT_MODEL):
                    name = "model." + stored.removeprefix(TEXT_MODEL)
                self.where[name], self._stored[name] = path, stored
                self.shapes[name], self.dtypes[name] = tuple(tensor.get_shape()), tensor.get_dtype()

    def _paths(self) -> list[Path]:
        whole, index = (
            self.folder / "model.safetensors",
            self.folder / "model.safetensors.index.json",
        )
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
        tensor = self._open[1].get_tensor(self._stored[name])
        self._read += _bytes(tensor)
        return tensor

    def scale_of(self, name: str) -> str:
        """Returns the name of a float8 tensor's scales; all shards of a table have one."""
        table = re.sub(r"\.shard_\d+\.weight$", TABLE_SCALE, name)
        return table if table != name and table in self.where else f"{name}_scale_inv"

    def close(self) -> None:
        self._open, self._read = None, 0


def _handle(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}), is it complete?") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error}), is it complete?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, expected a JSON object")
    return content


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )


def dequantise(
    weight: Float[Tensor, "R C"], scale: Float[Tensor, "r c"], block: tuple[int, int] = (128, 128)
) -> Float[Tensor, "R C"]:
    """Multiplies float8 weights by their block's scale, in float32.

    The last block of an axis may be incomplete.
    """
    out = weight.to(torch.float32, copy=True)
    for rows, our_name in zip(out.split(block[0]), scale.float(), strict=True):
        rows *= our_name.repeat_interleave(block[1])[: out.shape[1]]
    return out


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> LanguageModel:
    """Loads a folder of a published model, or of transformers' save_pretrained of one.

    dtype None keeps the stored one (float8 becomes bfloat16); router biases are always float32.
    ValueError, with the names, for another architecture, missing files, and tensors that are
    missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    description, files = _json(folder / "config.json"), Files(folder)
    family = family_of(description)
    config = family.config_of(description, files.where)
    block = _scale_block(description)
    _check_sizes(files, config, family)
    try:
        with torch.device("meta"):
            model = LanguageModel(config, seed=None)
    except (RuntimeError, OverflowError, TypeError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(
            f"{folder}: config.json: no model has such sizes, "
            f"expected those of the weights: {message}"
        ) from error
    _check(files, config, family, _state(model), block)
    dtype = dtype or _stored_dtype(files, family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if config.tied:
        model.head.weight = model.embed.weight
    _fill(_state(model), files, (family.places(config), family.copies(config)), block)
    return model.eval()


def _state(model: LanguageModel) -> dict[str, Tensor]:
    """Returns the state dict, and the buffers that it leaves out."""
    return {**dict(model.named_buffers()), **model.state_dict()}


def _scale_block(description: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the rows and columns that share a scale of float8 weights.

    None where a whole tensor has one scale.
    """
    block_size = (description.get("quantization_config") or {}).get("weight_block_size", [128, 128])
    if block_size is None:
        return None
    if (
        not isinstance(block_size, list)
        or len(block_size) != 2
        or not all(type(size) is int and size > 0 for size in block_size)
    ):
        raise ValueError(
            f"config.json: weight_block_size: got {block_size!r}, "
            "expected two sizes such as [128, 128]"
        )
    return block_size[0], block_size[1]


def _stored_dtype(files: Files, family: Family) -> torch.dtype:
    dtype = files.tensor(family.EMBEDDING).dtype
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _check_sizes(files: Files, config: ModelConfig, family: Family) -> None:
    """Refuses a config larger than the folder, before a model or its tensors' names are made."""

    def count(pattern: str) -> int:
        return len({match[1] for name in files.where if (match := re.search(pattern, name))})

    depth = config.mtp.depth if config.mtp is not None else 0
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
    block: tuple[int, int] | None,
) -> None:
    """Raises ValueError with every disagreement between the stored tensors and the config."""
    needed = family.places(config)
    all_places = {**needed, **family.copies(config)}
    scales = {
        files.scale_of(name): name for name, dtype in files.dtypes.items() if dtype == "F8_E4M3"
    }
    # An empty tensor (of no shared expert) has nothing to check.
    stored = {
        name for name in files.where if not family.skipped(name) and 0 not in files.shapes[name]
    }
    expected = {
        name: tuple(tensor_place.of(state).shape) for name, tensor_place in all_places.items()
    }
    expected |= {scale: _scale_shape(files.shapes[name], block) for scale, name in scales.items()}
    # One value, in whatever shape.
    whole = {scale for scale in scales if block is None or scale.endswith(TABLE_SCALE)}
    problems = {
        "missing": sorted((needed.keys() | scales.keys()) - stored),
        "not in this architecture": sorted(stored - all_places.keys() - scales.keys()),
        "misshapen": [
            f"{name} {files.shapes[name]}, expected {shape}"
            for name, shape in expected.items()
            if name in stored
            and files.shapes[name] != shape
            and not (name in whole and set(files.shapes[name]) <= {1})
        ],
        f"of a dtype other than {', '.join(FLOATS)}": [
            f"{name} {files.dtypes[name]}"
            for name in all_places
            if name in stored
            and all_places[name].of(state).is_floating_point()
            and files.dtypes[name] not in FLOATS
        ],
    }
    if any(problems.values()):
        message = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{files.folder}: tensors disagree with config.json. {message}")


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    return (
        (1, 1)
        if block is None
        else tuple(-(-size // step) for size, step in zip(shape, block, strict=False))
    )


@torch.no_grad()
def _fill(
    state: Mapping[str, Tensor],
    files: Files,
    tables: tuple[dict[str, Place], dict[str, Place]],
    block: tuple[int, int] | None,
) -> None:
    """Copies the tensors of the first table, and checks those of the second, which repeat some."""
    table, repeated = tables
    for name in sorted(table, key=lambda name: files.where[name]):
        table[name].of(state).copy_(_read(files, name, block))
    for name, tensor_place in repeated.items():
        if name in files.where and not torch.equal(
            tensor_place.of(state).cpu(), _read(files, name, block).to(tensor_place.of(state).dtype)
        ):
            raise ValueError(
                f"{files.folder}: {name} differs from what it should be a copy of, "
                f"{tensor_place.name}"
            )
    files.close()


def _read(files: Files, name: str, block: tuple[int, int] | None) -> Tensor:
    if files.dtypes[name] != "F8_E4M3":
        return files.tensor(name)
    scale_name = files.scale_of(name)
    weight, scale = files.tensor(name), files.tensor(scale_name)
    if block is None or scale_name.endswith(TABLE_SCALE):
        block, scale = (weight.shape[0], weight.shape[1]), scale.view(1, 1)
    return dequantise(weight, scale.float(), block)


def export(
    model: LanguageModel, folder: str | Path, *, shard_bytes: int = 4 << 30, **fields: Any
) -> None:
    """Writes a folder that the class of transformers for this architecture loads with equal logits.

    `fields` are added to config.json unchanged (eos_token_id,
    max_position_embeddings ...). ValueError where the model has a part that the format cannot
    express, with its name, or where the folder already contains a model.
    """
    folder, config = Path(folder), model.config
    family = family_for(config)
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
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(
    state: Mapping[str, Tensor], table: Mapping[str, Place], limit: int
) -> Iterator[list[str]]:
    """Yields the names of the table, in order, in groups of at most `limit` bytes."""
    names: list[str] = []
    size = 0
    for name, tensor_place in table.items():
        more = _bytes(tensor_place.of(state))
        if names and size + more > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names
