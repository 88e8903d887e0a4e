"""Reads folders of DeepSeek V2 and V3 models into a LanguageModel, and writes such folders.

    model.layers.1.mlp.experts.7.gate_proj.weight [F, D]
        <->  blocks.1.ffn.experts.gate_up[7, :, :F] transposed
    x.weight float8 e4m3, x.weight_scale_inv [R/128, C/128]
        ->   weight * its block's scale
    model.layers.N (N = num_hidden_layers)
        <->  mtp.0, whose embedding and head are the model's own

`places` is that table for a whole config, used in both directions. Weights are read file by file,
tensor by tensor, into the model's own memory. JSON and safetensors only: pickles are never opened,
and code in the folder is never read.

Released configurations of arXiv 2405.04434, 2412.19437 and 2501.12948.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rorqual.hub.configs import config_of, published
from rorqual.io import atomic_write, write_text
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig


class Place(NamedTuple):
    """The place of one published tensor in our state dict: state[name][slices].

    Its last two axes are exchanged if `transposed`.
    """

    name: str
    slices: tuple[int | slice, ...] = ()
    transposed: bool = False

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """Returns the part of our state dict, a view, in the published shape."""
        tensor = state[self.name][self.slices] if self.slices else state[self.name]
        return tensor.mT if self.transposed else tensor


ATTENTION = (
    "q_proj",
    "q_a_proj",
    "q_a_layernorm",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_a_layernorm",
    "kv_b_proj",
    "o_proj",
)
BIASED = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")  # biased where the config has attention_bias
SWIGLU = ("gate_proj", "up_proj", "down_proj")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3")  # dtypes of weights, as safetensors names them
# Bytes that are read of a mapped file before it is closed: until then they count as memory.
WINDOW = 64 << 20


def places(config: ModelConfig) -> dict[str, Place]:
    """Maps published names to places, for every tensor that a folder of this config must have."""
    table = {
        "model.embed_tokens.weight": Place("embed.weight"),
        "model.norm.weight": Place("norm.weight"),
    }
    if not config.tied:
        table["lm_head.weight"] = Place("head.weight")
    for index in range(config.layers):
        table |= _block(f"model.layers.{index}", f"blocks.{index}", config, index)
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs, ours = f"model.layers.{config.layers + depth}", f"mtp.{depth}"
        table |= _block(theirs, f"{ours}.block", config, config.layers + depth)
        for name, our_name in (
            ("enorm", "enorm"),
            ("hnorm", "hnorm"),
            ("eh_proj", "eh_proj"),
            ("shared_head.norm", "norm"),
        ):
            table[f"{theirs}.{name}.weight"] = Place(f"{ours}.{our_name}.weight")
    return table


def copies(config: ModelConfig) -> dict[str, Place]:
    """Maps published names to places, for tensors that a folder may repeat.

    These are MTP's embedding and head, and a tied head.
    """
    embed, head = Place("embed.weight"), Place("embed.weight" if config.tied else "head.weight")
    table = {"lm_head.weight": head} if config.tied else {}
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs = f"model.layers.{config.layers + depth}"
        table |= {f"{theirs}.embed_tokens.weight": embed, f"{theirs}.shared_head.head.weight": head}
    return table


def hollow(config: ModelConfig) -> dict[str, Place]:
    """Maps published names to empty places, for the shared experts of a model without any.

    The state dict needs an entry "" for them.
    """
    if config.moe is None or config.moe.shared:
        return {}
    blocks = config.layers + (config.mtp.depth if config.mtp is not None else 0)
    return {
        f"model.layers.{index}.mlp.shared_experts.{name}.weight": Place(
            "", transposed=name == "down_proj"
        )
        for index in range(config.moe.first_dense, blocks)
        for name in SWIGLU
    }


def _block(theirs: str, ours: str, config: ModelConfig, index: int) -> dict[str, Place]:
    assert config.mla is not None
    absent = (
        ("q_a_proj", "q_a_layernorm", "q_b_proj") if config.mla.q_lora_rank is None else ("q_proj",)
    )
    table = {
        f"{theirs}.self_attn.{name}.weight": Place(f"{ours}.attention.{name}.weight")
        for name in ATTENTION
        if name not in absent
    }
    if config.mla.bias:
        table |= {
            f"{theirs}.self_attn.{name}.bias": Place(f"{ours}.attention.{name}.bias")
            for name in BIASED
            if name not in absent
        }
    table[f"{theirs}.input_layernorm.weight"] = Place(f"{ours}.attention_norm.weight")
    table[f"{theirs}.post_attention_layernorm.weight"] = Place(f"{ours}.ffn_norm.weight")
    if config.has_experts(index):
        return table | _experts(f"{theirs}.mlp", f"{ours}.ffn", config)
    return table | {
        f"{theirs}.mlp.{name}.weight": Place(f"{ours}.ffn.{name}.weight") for name in SWIGLU
    }


def _experts(theirs: str, ours: str, config: ModelConfig) -> dict[str, Place]:
    moe = config.moe
    assert moe is not None
    table = {f"{theirs}.gate.weight": Place(f"{ours}.router.weight")}
    if moe.router.bias:
        table[f"{theirs}.gate.e_score_correction_bias"] = Place(
            f"{ours}.router.e_score_correction_bias"
        )
    if moe.shared:
        table |= {
            f"{theirs}.shared_experts.{name}.weight": Place(f"{ours}.shared.{name}.weight")
            for name in SWIGLU
        }
    every = slice(None)
    for expert in range(moe.routed):
        for name, our_name, columns in (
            ("gate_proj", "gate_up", slice(moe.width)),
            ("up_proj", "gate_up", slice(moe.width, None)),
            ("down_proj", "down", every),
        ):
            tensor_place = Place(
                f"{ours}.experts.{our_name}", (expert, every, columns), transposed=True
            )
            table[f"{theirs}.experts.{expert}.{name}.weight"] = tensor_place
    return table


class Files:
    """The weight files of a folder: the file, shape and dtype of each tensor.

    ValueError if a file is missing.
    """

    def __init__(self, folder: Path):
        self.folder, self.where, self.shapes, self.dtypes = folder, {}, {}, {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for path in self._paths():
            tensors = _handle(path)
            for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = tensors.get_slice(name)
                self.where[name] = path
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
        tensor = self._open[1].get_tensor(name)
        self._read += _bytes(tensor)
        return tensor

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
    """Loads a folder of DeepSeek V2, V2-Lite, V3, R1, or of transformers' save_pretrained of one.

    dtype None keeps the stored one (float8 becomes bfloat16); router biases are always float32.
    ValueError, with the names, for another architecture, missing files, and tensors that are
    missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    description, files = _json(folder / "config.json"), Files(folder)
    config = config_of(description, mtp_depth=_mtp_depth(description, files))
    block = _scale_block(description)
    _check_sizes(files, config)
    try:
        with torch.device("meta"):
            model = LanguageModel(config, seed=None)
    except (RuntimeError, OverflowError, TypeError) as error:
        message = str(error).splitlines()[0]
        raise ValueError(
            f"{folder}: config.json: no model has such sizes, "
            f"expected those of the weights: {message}"
        ) from error
    _check(files, config, model.state_dict(), block)
    dtype = dtype or _stored_dtype(files)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if config.tied:
        model.head.weight = model.embed.weight
    _fill(model.state_dict(), files, config, block)
    return model.eval()


def _mtp_depth(description: Mapping[str, Any], files: Files) -> int:
    """Counts the blocks stored after the last layer.

    A folder may have them in its config and leave out their weights.
    """
    depth = (
        re.match(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm)\.", name) for name in files.where
    )
    layers = description.get("num_hidden_layers")
    return len(
        {
            match[1]
            for match in depth
            if match and isinstance(layers, int) and int(match[1]) >= layers
        }
    )


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


def _stored_dtype(files: Files) -> torch.dtype:
    dtype = files.tensor("model.embed_tokens.weight").dtype
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _check_sizes(files: Files, config: ModelConfig) -> None:
    """Refuses a config larger than the folder, before a model or its tensors' names are made."""

    def count(pattern: str) -> int:
        return len({match[1] for name in files.where if (match := re.search(pattern, name))})

    depth = config.mtp.depth if config.mtp is not None else 0
    largest = {"num_hidden_layers": (config.layers, count(r"^model\.layers\.(\d+)\.") - depth)}
    if config.moe is not None:
        routers = [
            shape[0]
            for name, shape in files.shapes.items()
            if name.endswith(".mlp.gate.weight") and shape
        ]
        largest["n_routed_experts"] = (
            config.moe.routed,
            max(routers, default=count(r"\.mlp\.experts\.(\d+)\.")),
        )
    embed = files.shapes.get("model.embed_tokens.weight", ())
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
    files: Files, config: ModelConfig, state: Mapping[str, Tensor], block: tuple[int, int] | None
) -> None:
    """Raises ValueError with every disagreement between the stored tensors and the config."""
    needed, all_places = places(config), {**places(config), **copies(config)}
    scales = {
        f"{name}_scale_inv": name for name, dtype in files.dtypes.items() if dtype == "F8_E4M3"
    }
    # An empty tensor (of no shared expert) has nothing to check.
    stored = {
        name
        for name in files.where
        if not name.endswith(".rotary_emb.inv_freq") and 0 not in files.shapes[name]
    }
    expected = {
        name: tuple(tensor_place.of(state).shape) for name, tensor_place in all_places.items()
    }
    expected |= {scale: _scale_shape(files.shapes[name], block) for scale, name in scales.items()}
    whole = {scale for scale in scales if block is None}  # one value, in whatever shape
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
            if name in stored and files.dtypes[name] not in FLOATS
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
    state: Mapping[str, Tensor], files: Files, config: ModelConfig, block: tuple[int, int] | None
) -> None:
    table = places(config)
    for name in sorted(table, key=lambda name: files.where[name]):
        table[name].of(state).copy_(_read(files, name, block))
    for name, tensor_place in copies(config).items():
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
    weight, scale = files.tensor(name), files.tensor(f"{name}_scale_inv")
    if block is None:
        block, scale = (weight.shape[0], weight.shape[1]), scale.view(1, 1)
    return dequantise(weight, scale.float(), block)


def export(
    model: LanguageModel, folder: str | Path, *, shard_bytes: int = 4 << 30, **fields: Any
) -> None:
    """Writes a folder that DeepseekV2ForCausalLM or DeepseekV3ForCausalLM loads with equal logits.

    Both are classes of transformers. `fields` are added to config.json unchanged (eos_token_id,
    max_position_embeddings ...). ValueError where the model has a part that the format cannot
    express, with its name, or where the folder already contains a model.
    """
    folder, config = Path(folder), model.config
    description = published(
        config, dtype=str(model.embed.weight.dtype).removeprefix("torch."), **fields
    )
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        raise ValueError(f"{folder}: already holds a model, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    state = {**model.state_dict(), "": model.embed.weight.new_empty(0, config.dim)}
    table = {**places(config), **(copies(config) if not config.tied else {}), **hollow(config)}
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
