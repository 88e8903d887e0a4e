"""A DeepSeek V2 or V3 folder in -> our LanguageModel out, our LanguageModel -> such a folder.

    model.layers.1.mlp.experts.7.gate_proj.weight [F, D]   <->   blocks.1.ffn.experts.gate_up[7, :, :F] transposed
    x.weight float8 e4m3, x.weight_scale_inv [R/128, C/128]  ->   weight * its block's scale
    model.layers.N (N = num_hidden_layers)                  <->   mtp.0, whose embedding and head are the model's own

`places` is that table for a whole config, read in both directions. Weights go file by file, tensor by tensor, into
the model's own memory. Formats: safetensors, or torch.load(weights_only=True); nothing of a folder is executed.

Released configurations of arXiv 2405.04434, 2412.19437 and 2501.12948.
"""

import json
import pickle
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
from rorqual.model import LanguageModel, ModelConfig


class Place(NamedTuple):
    """Where one published tensor stands in our state: state[name][at], transposed."""

    name: str
    at: tuple[int | slice, ...] = ()
    transposed: bool = False

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """The part of our state, a view, in the published shape."""
        part = state[self.name][self.at] if self.at else state[self.name]
        return part.T if self.transposed else part


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
SWIGLU = ("gate_proj", "up_proj", "down_proj")


def places(config: ModelConfig) -> dict[str, Place]:
    """Published name -> place, for every tensor that a folder of this config must hold."""
    table = {"model.embed_tokens.weight": Place("embed.weight"), "model.norm.weight": Place("norm.weight")}
    if not config.tied:
        table["lm_head.weight"] = Place("head.weight")
    for index in range(config.layers):
        table |= _block(f"model.layers.{index}", f"blocks.{index}", config, index)
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs, ours = f"model.layers.{config.layers + depth}", f"mtp.{depth}"
        table |= _block(theirs, f"{ours}.block", config, config.layers + depth)
        for name, own in (("enorm", "enorm"), ("hnorm", "hnorm"), ("eh_proj", "eh_proj"), ("shared_head.norm", "norm")):
            table[f"{theirs}.{name}.weight"] = Place(f"{ours}.{own}.weight")
    return table


def copies(config: ModelConfig) -> dict[str, Place]:
    """Published name -> place, for tensors that a folder may hold again: MTP's embedding and head, a tied head."""
    embed, head = Place("embed.weight"), Place("embed.weight" if config.tied else "head.weight")
    table = {"lm_head.weight": head} if config.tied else {}
    for depth in range(config.mtp.depth if config.mtp is not None else 0):
        theirs = f"model.layers.{config.layers + depth}"
        table |= {f"{theirs}.embed_tokens.weight": embed, f"{theirs}.shared_head.head.weight": head}
    return table


def _block(theirs: str, ours: str, config: ModelConfig, index: int) -> dict[str, Place]:
    assert config.mla is not None
    absent = ("q_a_proj", "q_a_layernorm", "q_b_proj") if config.mla.q_lora_rank is None else ("q_proj",)
    table = {
        f"{theirs}.self_attn.{name}.weight": Place(f"{ours}.attention.{name}.weight")
        for name in ATTENTION
        if name not in absent
    }
    table[f"{theirs}.input_layernorm.weight"] = Place(f"{ours}.attention_norm.weight")
    table[f"{theirs}.post_attention_layernorm.weight"] = Place(f"{ours}.ffn_norm.weight")
    if config.has_experts(index):
        return table | _experts(f"{theirs}.mlp", f"{ours}.ffn", config)
    return table | {f"{theirs}.mlp.{name}.weight": Place(f"{ours}.ffn.{name}.weight") for name in SWIGLU}


def _experts(theirs: str, ours: str, config: ModelConfig) -> dict[str, Place]:
    moe = config.moe
    assert moe is not None
    table = {f"{theirs}.gate.weight": Place(f"{ours}.router.weight")}
    if moe.router.bias:
        table[f"{theirs}.gate.e_score_correction_bias"] = Place(f"{ours}.router.e_score_correction_bias")
    if moe.shared:
        table |= {f"{theirs}.shared_experts.{name}.weight": Place(f"{ours}.shared.{name}.weight") for name in SWIGLU}
    every = slice(None)
    for expert in range(moe.routed):
        for name, own, columns in (
            ("gate_proj", "gate_up", slice(moe.width)),
            ("up_proj", "gate_up", slice(moe.width, None)),
            ("down_proj", "down", every),
        ):
            place = Place(f"{ours}.experts.{own}", (expert, every, columns), transposed=True)
            table[f"{theirs}.experts.{expert}.{name}.weight"] = place
    return table


class Files:
    """The weight files of a folder: which tensor lies where, with its shape and dtype. ValueError if any is missing."""

    def __init__(self, folder: Path):
        self.folder, self.where, self.shapes, self.dtypes = folder, {}, {}, {}
        self._open: tuple[Path, Any] | None = None
        for path in self._paths():
            tensors = _handle(path)
            for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                part = tensors.get_slice(name) if path.suffix == ".safetensors" else tensors[name]
                self.where[name] = path
                self.shapes[name], self.dtypes[name] = _describe(part)

    def _paths(self) -> list[Path]:
        for whole in ("model.safetensors", "pytorch_model.bin"):
            index = self.folder / f"{whole}.index.json"
            if index.is_file():
                names = sorted(set(_json(index).get("weight_map", {}).values()))
                if lost := [name for name in names if Path(name).name != name or not (self.folder / name).is_file()]:
                    raise ValueError(f"{self.folder}: {index.name} names {_some(lost)}, which the folder does not hold")
                return [self.folder / name for name in names]
            if (self.folder / whole).is_file():
                return [self.folder / whole]
        raise ValueError(f"{self.folder}: no weights, expected model.safetensors or model.safetensors.index.json")

    def tensor(self, name: str) -> Tensor:
        """One stored tensor; only the file last read from stays open."""
        path = self.where[name]
        if self._open is None or self._open[0] != path:
            self._open = path, _handle(path)
        tensors = self._open[1]
        return tensors.get_tensor(name) if path.suffix == ".safetensors" else tensors[name]

    def close(self) -> None:
        self._open = None


def _handle(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, "pt")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not readable ({error}), is it complete?") from error


def _describe(part: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a tensor or of a safetensors slice, the dtype in safetensors' words."""
    if isinstance(part, Tensor):
        return tuple(part.shape), "F8_E4M3" if part.dtype == torch.float8_e4m3fn else str(part.dtype)
    return tuple(part.get_shape()), part.get_dtype()


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def dequantise(
    weight: Float[Tensor, "R C"], scale: Float[Tensor, "r c"], block: tuple[int, int] = (128, 128)
) -> Float[Tensor, "R C"]:
    """float8 weights times their block's scale, in float32; the last block of an axis may be cut off."""
    rows, columns = (scale.repeat_interleave(block[0], 0), block[1])
    return weight.float() * rows.repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]].float()


def load(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LanguageModel:
    """The model of a published folder (DeepSeek V2, V2-Lite, V3, R1, or transformers' save_pretrained of one).

    dtype None keeps the stored one (float8 becomes bfloat16); router biases are float32 always. ValueError, with the
    names, for another architecture, missing files, missing, left-over or misshapen tensors.
    """
    folder = Path(folder)
    description, files = _json(folder / "config.json"), Files(folder)
    config = config_of(description, mtp_depth=_mtp_depth(description, files))
    with torch.device("meta"):
        model = LanguageModel(config, seed=None)
    _check(files, config, model.state_dict())
    dtype = dtype or _stored_dtype(files)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    if config.tied:
        model.head.weight = model.embed.weight
    block = (description.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    _fill(model.state_dict(), files, config, tuple(block))
    return model.eval()


def _mtp_depth(description: Mapping[str, Any], files: Files) -> int:
    """Blocks stored behind the last one; a folder may promise them in its config and leave them out."""
    found = (re.match(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm)\.", name) for name in files.where)
    layers = description.get("num_hidden_layers", 0)
    return max((int(match[1]) - layers + 1 for match in found if match), default=0)


def _stored_dtype(files: Files) -> torch.dtype:
    dtype = files.tensor("model.embed_tokens.weight").dtype
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _check(files: Files, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """ValueError naming every kind of disagreement between what is stored and what the config says."""
    needed, known = places(config), {**places(config), **copies(config)}
    scales = {f"{name}_scale_inv" for name, dtype in files.dtypes.items() if dtype == "F8_E4M3"}
    stored = {name for name in files.where if not name.endswith(".rotary_emb.inv_freq")}
    misshapen = [
        f"{name} {files.shapes[name]}, expected {tuple(place.of(state).shape)}"
        for name, place in known.items()
        if name in files.shapes and files.shapes[name] != tuple(place.of(state).shape)
    ]
    problems = {
        "missing": sorted((needed.keys() | scales) - stored),
        "not in this architecture": sorted(stored - known.keys() - scales),
        "misshapen": misshapen,
    }
    if any(problems.values()):
        said = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"{files.folder}: tensors disagree with config.json. {said}")


@torch.no_grad()
def _fill(state: Mapping[str, Tensor], files: Files, config: ModelConfig, block: tuple[int, int]) -> None:
    table = places(config)
    for name in sorted(table, key=lambda name: files.where[name]):
        table[name].of(state).copy_(_read(files, name, block))
    for name, place in copies(config).items():
        if name in files.where and not torch.equal(
            place.of(state).cpu(), _read(files, name, block).to(place.of(state).dtype)
        ):
            raise ValueError(f"{files.folder}: {name} differs from what it should be a copy of, {place.name}")
    files.close()


def _read(files: Files, name: str, block: tuple[int, int]) -> Tensor:
    if files.dtypes[name] != "F8_E4M3":
        return files.tensor(name)
    weight = files.tensor(name)
    return dequantise(weight, files.tensor(f"{name}_scale_inv"), block)


def export(model: LanguageModel, folder: str | Path, *, shard_bytes: int = 4 << 30, **fields: Any) -> None:
    """Write a folder that transformers' DeepseekV2ForCausalLM or DeepseekV3ForCausalLM loads with equal logits.

    `fields` go into config.json as they are (eos_token_id, max_position_embeddings ...). ValueError where the model
    has a part that the format cannot hold, named, or where the folder already holds a model.
    """
    folder, config = Path(folder), model.config
    description = published(config, dtype=str(model.embed.weight.dtype).removeprefix("torch."), **fields)
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        raise ValueError(f"{folder}: already holds a model, expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    state, table = model.state_dict(), {**places(config), **(copies(config) if not config.tied else {})}
    shards = list(_shards(state, table, shard_bytes))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= dict.fromkeys(names, file)
        tensors = {
            name: table[name].of(state).detach().cpu().clone(memory_format=torch.contiguous_format) for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(_bytes(table[name].of(state)) for name in table)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (folder / "config.json").write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shards(state: Mapping[str, Tensor], table: Mapping[str, Place], most: int) -> Iterator[list[str]]:
    """The names of the table, in order, in runs of at most `most` bytes."""
    names: list[str] = []
    size = 0
    for name, place in table.items():
        more = _bytes(place.of(state))
        if names and size + more > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names
