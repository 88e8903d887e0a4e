"""Any causal model of transformers in -> the same model with Engram in some of its blocks, out.

    hidden <- hidden + engram(hidden)           before the block, as in our own models
    W_v = 0 and conv = 0 at first               so the model says what it said, bit for bit, until memory is trained

Hooks put it there and take it away; no class of the host is changed. What memory keeps between calls (the last N-1 ids
and the convolution's values) lives on the host's own cache object and follows its verbs. Only memory is trainable.
Retrofit of Conditional Memory via Scalable Lookup, arXiv:2601.07372.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rorqual import config as configs
from rorqual.data.tokenizer import Tokenizer
from rorqual.layers.basics import Layout, layout
from rorqual.layers.cache import Bundle, Past
from rorqual.layers.engram import Addresses, Engram, EngramConfig, row_totals
from rorqual.storage import DeviceTable, Pending

NAME = "rorqual_memory"  # the submodule of the host that holds the memory
FORMAT = "rorqual-memory-1"


class Memory(nn.Module):
    """Addresses, tables and Engram layers beside a host. `attach` makes it; `detach` takes it off again.

    It is a submodule of the host, so that `.to`, `.parameters()` and a trainer find it.
    """

    def __init__(
        self, config: EngramConfig, tokenizer: Tokenizer, vocabulary: int, width: int, *, seed: int, sparse: bool
    ) -> None:
        super().__init__()
        self.config, self.width = config, width
        self.addresses = Addresses(config, tokenizer.canonical_map() if config.canonical else None, vocabulary)
        self.tables = nn.ModuleList(DeviceTable(rows, config.head_dim, sparse=sparse) for rows in row_totals(config))
        self.engrams = nn.ModuleList(Engram(config, width) for _ in config.layers)
        self._start(torch.Generator().manual_seed(seed))
        self._host: tuple[nn.Module, ...] = ()  # a tuple, so that the host is no submodule of its memory
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._hooks: list[Any] = []
        self._now: tuple[Layout, Tensor | None, list[Pending], Bundle | None] | None = None

    @torch.no_grad()
    def _start(self, generator: torch.Generator) -> None:
        """Rows normal with deviation 0.02; keys as Engram's init; values and convolution 0: an identity."""
        for table in self.tables:
            for parameter in table.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        for engram in self.engrams:
            assert isinstance(engram, Engram)
            engram.reset(generator)
            engram.value_proj.weight.zero_()

    @property
    def _stores(self) -> list[DeviceTable]:
        return cast(list[DeviceTable], list(self.tables))

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def new_state(self) -> Bundle:
        """What one cache of the host carries for the memory."""
        of = (1, 0, torch.float32, torch.device("cpu"))
        parts: dict[str, Any] = {"past": Past(), "ids": self.addresses.new_cache(*of)}
        for layer, engram in zip(self.config.layers, self.engrams, strict=True):
            assert isinstance(engram, Engram)
            parts[f"layer{layer}"] = engram.new_cache(*of)
        return Bundle(**parts)

    def mount(self, host: nn.Module) -> None:
        """Hook into the host and make memory alone trainable. ValueError where it carries a memory already."""
        if hasattr(host, NAME):
            raise ValueError("attach: the model already carries a memory; detach it first")
        body, blocks = find_blocks(host)
        if late := [layer for layer in self.config.layers if layer >= len(blocks)]:
            raise ValueError(f"layers: got {late}, expected indices of the model's blocks, 0..{len(blocks) - 1}")
        self._frozen = [(parameter, parameter.requires_grad) for parameter in host.parameters()]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        self._hooks = [body.register_forward_pre_hook(self._before, with_kwargs=True)]
        for place, layer in enumerate(self.config.layers):
            self._hooks.append(blocks[layer].register_forward_pre_hook(self._recalling(place), with_kwargs=True))
        self._host = (host,)
        first = next(host.parameters())
        self.to(device=first.device, dtype=first.dtype)
        host.add_module(NAME, self)

    def detach(self) -> nn.Module:
        """Take the memory off: the host computes, trains and saves as before. Returns the host."""
        if not self.attached:
            raise ValueError("detach: this memory is not attached")
        for hook in self._hooks:
            hook.remove()
        for parameter, trained in self._frozen:
            parameter.requires_grad_(trained)
        (host,) = self._host
        delattr(host, NAME)
        self._hooks, self._frozen, self._host, self._now = [], [], (), None
        return host

    def save(self, path: str | Path) -> None:
        """The memory alone, as one safetensors file whose header says what it fits."""
        about = {"config": configs.to_dict(self.config), "width": self.width, "vocabulary": self._vocabulary}
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": FORMAT, "memory": json.dumps(about)})

    @property
    def _vocabulary(self) -> int:
        return len(self.addresses.canonical_map)

    def _before(self, body: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the host's body runs: hash the ids once and ask for the rows of all layers."""
        kwargs = dict(kwargs)
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("memory: got inputs_embeds, expected input_ids: rows are addressed by token ids")
        kwargs["past_key_values"] = cache = self._cache(body, kwargs)
        state = None if cache is None else cache.memory
        past = None if state is None else state.past
        present, documents = _presence(kwargs, ids), None
        if past is None or past.length == 0:
            documents = _documents(kwargs, ids)
        batch, time = ids.shape
        where = layout(batch, time, ids.device, documents=documents, present=present, past=past)
        rows = self.addresses(ids, where, None if state is None else state.ids)  # [Lm, B, T, R]
        pending = [table.request(rows[place]) for place, table in enumerate(self._stores)]
        self._now = (where, self.addresses.live(ids, where), pending, state)
        return args, kwargs

    def _cache(self, body: Any, kwargs: dict[str, Any]) -> Any:
        """The host's cache, made to carry the memory's state; None where this call keeps none."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            use = kwargs.get("use_cache")
            if not (body.config.use_cache if use is None else use) or (body.training and torch.is_grad_enabled()):
                return None
            cache = DynamicCache(config=body.config)
        if not isinstance(cache, Remembering):
            if cache.get_seq_length():
                raise ValueError("memory: got a cache filled before the memory was attached, expected a new one")
            cache.__class__ = type("Remembering" + type(cache).__name__, (Remembering, type(cache)), {})
            cache.memory = self.new_state()
        return cache

    def _recalling(self, place: int):
        layer = self.config.layers[place]

        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            assert self._now is not None
            where, live, pending, state = self._now
            hidden: Float[Tensor, "B T D"] = args[0] if args else kwargs["hidden_states"]
            kept = None if state is None else state.parts[f"layer{layer}"]
            recalled = pending[place].wait().flatten(-2)  # [B, T, M]
            given = (hidden[:, :, None], recalled, where)
            if kept is not None and where.past == 0 and torch.is_grad_enabled():
                with torch.no_grad():  # a cache carries no gradients: fill it beside the pass that does
                    self.engrams[place](*given, kept, live)
                kept = None
            added = self.engrams[place](*given, kept, live)[:, :, 0]
            hidden = hidden + added.to(hidden.dtype)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook


class Remembering:
    """Mixed into the class of one host cache: the memory's state follows what is done to the cache."""

    memory: Bundle

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.memory.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = self.memory.parts["ids"].buffer
        if rows is not None:
            self.memory.select(torch.arange(len(rows), device=rows.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """By what the host's cache lost, whichever way this version of transformers counts."""
        before = self.get_seq_length()  # type: ignore[attr-defined]
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.memory.crop(before - self.get_seq_length())  # type: ignore[attr-defined]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.memory.reset()


def attach(
    model: PreTrainedModel,
    tokenizer: Any,
    layers: tuple[int, ...] = (1,),
    *,
    seed: int = 0,
    sparse: bool = False,
    **options: Any,
) -> Memory:
    """Give a transformers causal model an Engram before the blocks `layers`; returns the memory.

    tokenizer: the model's, ours or a fast one of transformers. `options` are EngramConfig's other fields
    (rows_per_head, heads, head_dim, ...). Logits are unchanged, bit for bit, until the memory is trained; the host's
    parameters are frozen. `sparse`: the tables' gradients name only the rows that were read, which few optimizers
    take (ours does). ValueError for a model whose blocks cannot be found, or layers that it does not have.
    """
    ours = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.of(tokenizer)
    known = {field.name for field in dataclasses.fields(EngramConfig)} - {"layers"}
    if unknown := set(options) - known:
        raise ValueError(f"attach: got {', '.join(sorted(unknown))}, expected fields of EngramConfig")
    settings = configs.from_dict(EngramConfig, {"pad_id": ours.pad_id, **options, "layers": list(layers)})
    width = model.get_input_embeddings().weight.shape[1]
    memory = Memory(settings, ours, _vocabulary_of(model, ours), width, seed=seed, sparse=sparse)
    memory.mount(model)
    return memory


def load_memory(model: PreTrainedModel, tokenizer: Any, path: str | Path) -> Memory:
    """Attach what `Memory.save` wrote. ValueError where it is no such file, or is of another model or tokenizer."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no memory: got format {header.get('format')!r}, expected {FORMAT!r}")
    about = json.loads(header["memory"])
    width = model.get_input_embeddings().weight.shape[1]
    if about["width"] != width:
        raise ValueError(f"{path}: made for a model of width {about['width']}, got one of width {width}")
    options = {name: value for name, value in about["config"].items() if name != "layers"}
    memory = attach(model, tokenizer, tuple(about["config"]["layers"]), **options)
    try:
        memory.load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        memory.detach()
        raise ValueError(f"{path}: {error}") from error
    return memory


def find_blocks(host: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module whose forward runs the blocks, and the blocks."""
    config = getattr(host, "config", None)
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) if config is not None else None
    for module in host.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count and getattr(module, "config", None) is not None:
                return module, child
    raise ValueError(
        f"attach: found no list of {count} blocks in {type(host).__name__}, expected a causal model of transformers"
    )


def _vocabulary_of(model: PreTrainedModel, tokenizer: Tokenizer) -> int:
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocabulary > rows:
        raise ValueError(
            f"tokenizer: got {tokenizer.vocabulary} ids, expected at most the model's {rows}: is it the model's own?"
        )
    return rows


def _presence(kwargs: dict[str, Any], ids: Tensor) -> Tensor | None:
    """Which of the new tokens are there, from the host's attention mask."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < ids.shape[1]:
        raise ValueError("memory: expected a two-dimensional attention_mask [batch, cached + new tokens], or none")
    present = mask[:, -ids.shape[1] :].bool()
    return None if bool(present.all()) else present


def _documents(kwargs: dict[str, Any], ids: Tensor) -> Tensor | None:
    """Packed documents, which the host is told of by position ids that start again; None where they do not."""
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or positions.shape[-1] != ids.shape[1]:
        return None
    begins = nn.functional.pad(positions.diff(dim=-1) != 1, (1, 0))
    return begins.long().cumsum(-1).expand(ids.shape) if bool(begins.any()) else None
