"""Adds Engram to blocks of any causal model of transformers.

    hidden <- hidden + engram(hidden)       before the block, as in our own models; every residual
                                            stream with its own gate, where a model has several
    W_v = 0 and conv = 0 at first           so that the logits are unchanged, bit for bit, until the
                                            memory is trained

Hooks add it and are removed again; no class of the host is changed. The memory's state between
calls (the ids and the convolution's values) is stored on the host's own cache object and follows
the operations on it. Only the memory is trainable, and PEFT's adapters, whichever of the two was
added first.
Retrofit of Conditional Memory via Scalable Lookup, arXiv:2601.07372.

A memory of facts (`FactMemory`) is mounted alike; in place of hashed n-grams it adds the rows of
the subjects that a text names (hub/facts.py).
"""

import dataclasses
import functools
import inspect
import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Shaped
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache as HubCache
from transformers import DynamicCache

from rorqual import config as configs
from rorqual.data.tokenizer import Tokenizer
from rorqual.hub.facts import (
    AddRows,
    Entry,
    FactConfig,
    Stored,
    Subjects,
    read_facts,
    tokenizer_sha256,
    write_facts,
)
from rorqual.hub.padding import Columns, Packing, packing
from rorqual.io import atomic_write
from rorqual.layers.addresses import Addresses
from rorqual.layers.cache import Appended, BlockCache, Cache, NewTokens, Past
from rorqual.layers.context import Context, context
from rorqual.layers.engram import Engram
from rorqual.model_config import EngramConfig, row_totals
from rorqual.tables import Table
from rorqual.tensor_file import read_tensors

NAME = "rorqual_memory"  # the submodule of the host that holds the memory
FORMAT = "rorqual-memory-1"


class Memory(nn.Module):
    """Addresses, tables and Engram layers of a host model. `attach` adds it; `detach` removes it.

    It is a submodule of the host, so that `.to`, `.parameters()` and a trainer include it.
    """

    def __init__(
        self,
        config: EngramConfig,
        tokenizer: Tokenizer,
        vocab_size: int,
        width: int,
        streams: int = 1,
        *,
        seed: int,
    ) -> None:
        super().__init__()
        self.config: EngramConfig | FactConfig = config
        self.width = width
        self.vocab_size = vocab_size
        self.streams = streams
        self.addresses: Addresses | Subjects = Addresses(
            config, tokenizer.canonical_map() if config.canonical else None, vocab_size
        )
        self.tables = nn.ModuleList(Table(rows, config.head_dim) for rows in row_totals(config))
        self.engrams = nn.ModuleList(Engram(config, width, streams) for _ in config.layers)
        self.start("values", seed)
        self._set_unmounted()

    def _set_unmounted(self) -> None:
        """Sets what a memory knows about its host, which is nothing yet."""
        # A tuple, so that the host is no submodule of its memory.
        self._host: tuple[nn.Module, ...] = ()
        self._frozen: list[tuple[nn.Parameter, bool]] = []
        self._trained: list[tuple[nn.Parameter, bool]] = []
        self._adapters: tuple[str, ...] = ()
        self._hooks: list[Any] = []
        self._caches: list[weakref.ref[Any]] = []  # caches whose class was changed
        self._now: list[Context] | None = None  # of the current call, one a layer
        self._packing: Packing | None = None  # of the current call

    @torch.no_grad()
    def start(self, zero: str, seed: int = 0) -> None:
        """Draws the weights of a new memory, which adds nothing to the hidden states at first.

        Rows and projections are normal with deviation 0.02; the convolution is 0, and so is `zero`.
        """
        generator = torch.Generator().manual_seed(seed)
        for table, engram in zip(self._stores, self.engrams, strict=True):
            assert isinstance(engram, Engram)
            table.weight.copy_(torch.randn(table.weight.shape, generator=generator) * 0.02)
            engram.reset(generator)
            (engram.value_proj if zero == "values" else table).weight.zero_()

    @property
    def _stores(self) -> list[Table]:
        """The tables, one for each layer with memory."""
        return cast(list[Table], list(self.tables))

    @property
    def attached(self) -> bool:
        """Whether the memory's hooks are on a host."""
        return bool(self._hooks)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state of a copy: without the caches of others and the current call."""
        return self.__dict__ | {"_caches": [], "_now": None, "_packing": None}

    def new_state(self, batch: int) -> "MemoryCache":
        """Returns the memory's state for one cache of the host, for `batch` sequences."""
        halo = self.config.halo
        ids = Appended(before=self.config.ngram - 1, fill=self.config.missing_id)
        layers = [BlockCache(None, Everything(halo) if halo else None) for _ in self.config.layers]
        return MemoryCache(Cache(layers, Past(batch), ids), Columns())

    def mount(self, host: nn.Module) -> None:
        """Adds hooks to the host and makes only the memory trainable, beside PEFT's adapters.

        ValueError, and nothing changes, where that is not possible.
        """
        if any(isinstance(module, Memory) for module in host.modules()):
            raise ValueError("attach: the model already carries a memory; detach it first")
        body, blocks = find_blocks(host)
        if late := [layer for layer in self.config.layers if layer >= len(blocks)]:
            raise ValueError(
                f"layers: got {late}, expected indices of the model's blocks, 0..{len(blocks) - 1}"
            )
        lacking = {"input_ids", "past_key_values"} - inspect.signature(
            body.forward
        ).parameters.keys()
        if lacking or not getattr(host, "_supports_default_dynamic_cache", lambda: True)():
            what = (
                f"takes no {', '.join(sorted(lacking))}"
                if lacking
                else "has a cache of its own kind"
            )
            raise ValueError(
                f"attach: {type(body).__name__} {what}, expected a model with transformers' Cache"
            )
        if len(devices := {str(parameter.device) for parameter in host.parameters()}) > 1:
            raise ValueError(
                f"attach: got a model on {', '.join(sorted(devices))}, "
                "expected one device for all of it"
            )
        floats = [parameter for parameter in host.parameters() if parameter.is_floating_point()]
        self.to(device=floats[0].device, dtype=floats[0].dtype)
        self._adapters = _adapters(host)
        self._frozen = (
            [] if self._adapters else [(parameter, parameter.requires_grad) for parameter in floats]
        )
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        self._hooks = [
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            body.register_forward_hook(self._after, always_call=True),
        ]
        for table_index, layer in enumerate(self.config.layers):
            hook = functools.partial(self._add_engram, table_index)
            self._hooks.append(blocks[layer].register_forward_pre_hook(hook, with_kwargs=True))
        self._host = (host,)
        host.add_module(NAME, self)

    def detach(self) -> nn.Module:
        """Removes the memory and returns the host.

        The host computes, trains and saves as before, and so do its caches.
        """
        if not self.attached:
            raise ValueError("detach: this memory is not attached")
        for hook in self._hooks:
            hook.remove()
        (host,) = self._host
        if not _adapters(host):
            for parameter, trained in self._frozen:
                parameter.requires_grad_(trained)
        for reference in self._caches:
            if (cache := reference()) is not None:
                cache.restore()
        delattr(host, NAME)
        self._hooks = []
        self._frozen = []
        self._caches = []
        self._host = ()
        self._now = None
        return host

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Lists the modules as nn.Module does, after it has made a memory trainable again.

        That is a memory that PEFT froze with its host.
        """
        self._undo_freezing()
        return super().named_modules(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> "Memory":
        """Sets what is trained as nn.Module does.

        A memory that this call freezes stays frozen when PEFT is added.
        """
        super().requires_grad_(requires_grad)
        self._trained = []
        return self

    def _undo_freezing(self) -> None:
        """Restores what was trainable before PEFT froze the whole model.

        PEFT freezes all parameters when it is added, and calls no hook. So this runs when the
        modules or parameters are listed next, for example by an optimizer. It acts once: later
        freezing is intended.
        """
        before = self._adapters
        self._adapters = _adapters(self._host[0]) if self._host else ()
        parameters = [parameter for child in self.children() for parameter in child.parameters()]
        if any(parameter.requires_grad for parameter in parameters):
            self._trained = [(parameter, parameter.requires_grad) for parameter in parameters]
        elif set(self._adapters) - set(before):
            for parameter, trained in self._trained:
                parameter.requires_grad_(trained)

    def save(self, path: str | Path) -> None:
        """Writes the memory alone, as one safetensors file, atomically.

        The file's header describes the models that it fits.
        """
        about = {
            "config": configs.to_dict(self.config),
            "width": self.width,
            "vocab_size": self.vocab_size,
        }
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        with atomic_write(path) as beside:
            save_file(tensors, beside, metadata={"format": FORMAT, "memory": json.dumps(about)})

    def _before(
        self, body: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hashes the ids once and prefetches the rows of all layers, before the body runs."""
        if args:
            kwargs = (
                dict(zip(inspect.signature(body.forward).parameters, args, strict=False)) | kwargs
            )
        ids = kwargs.get("input_ids")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "memory: got inputs_embeds, expected input_ids: rows are addressed by token ids"
            )
        cache = self._cache(body, kwargs)
        if cache is not None:
            kwargs["past_key_values"] = cache
        state = None if cache is None else cache.rorqual_state
        columns = 0 if state is None else state.columns.count
        packed = self._packing = packing(_valid(kwargs, ids, columns))
        document_ids = _documents(kwargs, ids) if columns == 0 else None
        tokens: Tensor = ids if packed is None else packed.pack(ids)
        batch, time = tokens.shape
        ctx = context(
            batch,
            time,
            ids.device,
            document_ids=document_ids,
            lengths=None if packed is None else packed.lengths,
            past=None if state is None else state.cache.past,
        )
        history = None if state is None else state.cache.ids
        rows = self.addresses(tokens, ctx, history)  # [Lm, B, T, R]
        if state is not None:
            state.columns.append(batch, time, packed)
        pending = [
            table.prefetch(rows[table_index]) for table_index, table in enumerate(self._stores)
        ]
        ctx = dataclasses.replace(ctx, lookup_mask=self.addresses.lookup_mask(tokens, ctx))
        caches = (None,) * len(pending) if state is None else state.cache.layers
        self._now = [ctx.for_block(cache, row) for cache, row in zip(caches, pending, strict=True)]
        return (), kwargs

    def _after(self, body: nn.Module, args: tuple, output: Any) -> None:
        """Forgets the rows and the packing of the call, also after one that failed."""
        self._now = self._packing = None

    def _cache(self, body: Any, kwargs: dict[str, Any]) -> Any:
        """Returns the host's cache with the memory's state; None where this call keeps no cache."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("cache") is not None:
            raise ValueError(
                "memory: got a paged cache, expected generate(), which says what follows what"
            )
        if cache is None:
            use = kwargs.get("use_cache")
            use = getattr(body.config, "use_cache", False) if use is None else use
            if not use or (body.training and torch.is_grad_enabled()):
                return None
            cache = DynamicCache(config=body.config)
        if not isinstance(cache, HubCache):
            raise ValueError(
                f"memory: got past_key_values as {type(cache).__name__}, "
                "expected a Cache of transformers"
            )
        if not isinstance(cache, EngramCache):
            cache.__class__ = type("Engram" + type(cache).__name__, (EngramCache, type(cache)), {})
            self._caches = [reference for reference in self._caches if reference() is not None] + [
                weakref.ref(cache)
            ]
            state = self.new_state(len(kwargs["input_ids"]))
            cache.rorqual_state, cache.rorqual_memory = state, weakref.ref(self)
        length = int(cache.get_seq_length())
        reference = cache.rorqual_state.columns.count
        if length != reference or cache.rorqual_memory() is not self:
            seen = reference if cache.rorqual_memory() is self else 0
            got = f"a cache of {length} tokens, {seen} of which it has seen"
            raise ValueError(
                f"memory: got {got}, "
                "expected a new one: it was filled before the memory was attached"
            )
        return cache

    def _add_engram(
        self, table_index: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Adds Engram's output to the hidden states, before a block with memory runs."""
        assert self._now is not None
        hidden: Float[Tensor, "B T ..."] = args[0] if args else kwargs["hidden_states"]
        if list(hidden.shape[2:]) not in _forms(self.width, self.streams):
            got = f"{type(block).__name__} with hidden states {list(hidden.shape)}"
            raise ValueError(
                f"memory: got {got}, expected [batch, time, {self.width}]: "
                "no memory fits this model"
            )
        packed = self._packing
        tokens = hidden if packed is None else packed.pack(hidden)
        streams = tokens.reshape(*tokens.shape[:2], self.streams, self.width)
        added = self.engrams[table_index](streams, self._now[table_index]).view(tokens.shape)
        added = added if packed is None else packed.unpack(added)
        hidden = hidden + added.to(hidden.dtype)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


class FactMemory(Memory):
    """A memory of facts: the rows of the subjects that a text names, added to the hidden states.

    `entries` says whose they are; the tables have a row more, the first, which is 0.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        layers: tuple[int, ...],
        vocab_size: int,
        width: int,
        streams: int = 1,
        *,
        scales: Sequence[float] | None = None,
    ) -> None:
        """Makes rows of 0. `scales`: what the rows of each layer are multiplied by."""
        nn.Module.__init__(self)
        subjects = Subjects(entries, tokenizer, len(layers))
        self.config = FactConfig(layers=tuple(layers), ngram=subjects.longest + 1)
        self.entries = tuple(entries)
        self.digest = tokenizer_sha256(tokenizer)
        self.width = width
        self.vocab_size = vocab_size
        self.streams = streams
        self.addresses = subjects
        self.tables = nn.ModuleList(Table(len(entries) + 1, width) for _ in layers)
        self.engrams = nn.ModuleList(
            AddRows(scale) for scale in scales or [1.0 for _ in self.config.layers]
        )
        with torch.no_grad():
            for table in self._stores:
                table.weight.zero_()
        self._set_unmounted()

    @property
    def _adders(self) -> list[AddRows]:
        """The modules that add the rows, one a table."""
        return cast(list[AddRows], list(self.engrams))

    @property
    def rows(self) -> Float[Tensor, "E Lm D"]:
        """What is added for each entry in each layer: a copy."""
        values = [
            table.weight.detach()[1:] * engram.scale
            for table, engram in zip(self._stores, self._adders, strict=True)
        ]
        return torch.stack(values, dim=1)

    @torch.no_grad()
    def set_rows(self, index: Sequence[int], values: Float[Tensor, "E Lm D"]) -> None:
        """Sets the rows of the entries `index`; those of the others do not change."""
        rows = torch.tensor(list(index), dtype=torch.long) + 1
        for layer, (table, engram) in enumerate(zip(self._stores, self._adders, strict=True)):
            weight = table.weight
            weight[rows.to(weight.device)] = (values[:, layer].to(engram.scale) / engram.scale).to(
                weight
            )

    def focus(self, rows: Int[Tensor, " B"] | None) -> None:
        """Says which row of each sequence alone gets a gradient, counted from 1; None: all."""
        cast(Subjects, self.addresses).focus = rows

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Lets the host compute what it computes without memory."""
        subjects = cast(Subjects, self.addresses)
        subjects.silent = True
        try:
            yield
        finally:
            subjects.silent = False

    def index(self, subject: str) -> int:
        """Returns which entry has this subject; ValueError where there is none."""
        for number, entry in enumerate(self.entries):
            if subject == entry.subject or subject in entry.aliases:
                return number
        raise ValueError(
            f"got subject {subject!r}, expected one of the {len(self.entries)} of this memory"
        )

    def stored(self, dtype: torch.dtype = torch.float32) -> Stored:
        """Returns what a file of this memory holds, with its rows in `dtype`."""
        return Stored(
            layers=self.config.layers,
            width=self.width,
            tokenizer=self.digest,
            entries=self.entries,
            rows=self.rows.to(dtype),
        )

    def save(self, path: str | Path) -> None:
        """Writes the memory into a folder, whole or not at all, in the dtype that it has."""
        write_facts(path, self.stored(self._stores[0].weight.dtype))


class Everything(Appended):
    """Stores all tokens, not the last few: a host's cache can be cropped by any number of them.

    Gradients of new tokens are kept.
    """

    def __init__(self, count: int) -> None:
        super().__init__(before=count)

    def extend(self, new: Shaped[Tensor, "B T ..."], ctx: NewTokens) -> Shaped[Tensor, "B L ..."]:
        """Stores `new`; returns the `before` tokens before it, and `new` with its gradient."""
        self.append(new, ctx)
        window = self.window(ctx, new.shape[1])
        return torch.cat([window[:, : self.before], new], dim=1)


@dataclasses.dataclass(eq=False)
class MemoryCache:
    """The memory's state between calls of its host."""

    cache: Cache
    columns: Columns

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keeps the sequences `index`, in that order."""
        self.cache.select(index)
        self.columns.select(index)

    def crop(self, count: int) -> None:
        """Removes the last `count` columns."""
        self.cache.crop(self.columns.tokens(count, self.cache.past.batch))
        self.columns.crop(count)

    def reset(self) -> None:
        """Removes all tokens."""
        self.cache.reset()
        self.columns.reset()


class EngramCache:
    """Applies the operations on a host's cache to the memory's state, too, as a mixin."""

    rorqual_state: MemoryCache
    rorqual_memory: "weakref.ref[Memory]"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps the sequences `beam_idx`, in that order, here and in the memory's state."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.rorqual_state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, numbers or a mask, here and in the memory's state."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.rorqual_state.select(
            indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times, here and in the memory's state."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        sequences = torch.arange(self.rorqual_state.cache.past.batch)
        self.rorqual_state.select(sequences.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Crops the memory's state by what the host's cache lost.

        So it does not depend on how the version of transformers counts.
        """
        before = int(self.get_seq_length())  # type: ignore[attr-defined]
        super().crop(tokens_to_remove)  # type: ignore[misc]
        lost = before - int(self.get_seq_length())  # type: ignore[attr-defined]
        self.rorqual_state.crop(min(lost, self.rorqual_state.columns.count))

    def reset(self) -> None:
        """Removes all tokens, here and from the memory's state."""
        super().reset()  # type: ignore[misc]
        self.rorqual_state.reset()

    def restore(self) -> None:
        """Restores the cache to its state before the memory was attached."""
        self.__class__ = type(self).__bases__[1]
        del self.rorqual_state, self.rorqual_memory


def attach(
    model: nn.Module,
    tokenizer: Any,
    layers: tuple[int, ...] | str | Path = (1,),
    *,
    seed: int = 0,
    zero: str = "values",
    **options: Any,
) -> Memory:
    """Adds an Engram before the blocks `layers` of a transformers causal model.

    Or it adds the memory in a file or folder, if `layers` is its path: what `Memory.save` or
    `rorqual teach` wrote. It returns the memory. The model may also be PEFT's around a causal
    model. tokenizer: the model's, ours or a fast one of transformers. `options` are EngramConfig's
    other fields
    (rows_per_head, heads, head_dim, ...). Logits are unchanged, bit for bit, until the memory is
    trained; the host's parameters are frozen, but not PEFT's adapters. Its rows have dense
    gradients, which every optimizer accepts; rorqual's own uses sparse ones, for the rows that were
    read, during its steps. `zero`: what is 0 at first, "values" (W_v) or "rows". With "rows", text
    whose n-grams were never trained keeps its logits, bit for bit, unless its hashes collide with
    trained rows. The memory has the model's device and dtype; of a model in bfloat16 it is better
    trained in float32 (`memory.float()`). In a model of several residual streams (DeepSeek-V4,
    Qwen4-Exp) each stream has its own gate. ValueError for a model whose blocks cannot be found or
    take other hidden states, or layers that it does not have.
    """
    if isinstance(layers, (str, Path)):
        if options or seed or zero != "values":
            raise ValueError("attach: got a path and options, expected the path: it has its own")
        return load_memory(model, tokenizer, layers)
    ours = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.of(tokenizer)
    fields = {field.name for field in dataclasses.fields(EngramConfig)} - {"layers"}
    if unknown := set(options) - fields:
        raise ValueError(
            f"attach: got {', '.join(sorted(unknown))}, expected fields of EngramConfig"
        )
    if zero not in ("values", "rows"):
        raise ValueError(f"zero: got {zero!r}, expected values or rows")
    settings = configs.from_dict(
        EngramConfig, {"pad_id": ours.pad_id, **options, "layers": list(layers)}
    )
    # This check comes before anything large is allocated.
    _check_hidden(model, *find_blocks(model))
    memory = Memory(
        settings,
        ours,
        _vocab_size_of(model, ours),
        width_of(model),
        streams_of(model),
        seed=seed,
    )
    memory.start(zero, seed)
    memory.mount(model)
    return memory


def load_memory(model: nn.Module, tokenizer: Any, path: str | Path) -> Memory:
    """Attaches a memory that `Memory.save` or `rorqual teach` wrote.

    An Engram has the dtype it had, a memory of facts the model's. ValueError where the file or
    folder is none, or is of another model or tokenizer; the model is then left as it was.
    """
    if Path(path).is_dir():
        return attach_facts(model, tokenizer, read_facts(path), str(path))
    config, width, tensors = _read(path)
    if width != (model_width := width_of(model)):
        raise ValueError(
            f"{path}: made for a model of width {width}, got one of width {model_width}"
        )
    options = {name: value for name, value in config.items() if name != "layers"}
    memory = attach(model, tokenizer, tuple(config["layers"]), **options)
    try:
        memory.to(tensors["engrams.0.value_proj.weight"].dtype).load_state_dict(tensors)
    except (ValueError, RuntimeError) as error:
        memory.detach()
        raise ValueError(f"{path}: {error}") from error
    return memory


def attach_facts(
    model: nn.Module,
    tokenizer: Any,
    stored: Stored,
    name: str = "memory",
    *,
    scales: Sequence[float] | None = None,
) -> FactMemory:
    """Adds a memory of facts to a transformers causal model; errors call it `name`.

    `scales` are for training: what the rows of each layer are multiplied by.
    """
    ours = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.of(tokenizer)
    _check_hidden(model, *find_blocks(model))
    width = width_of(model)
    if stored.width != width:
        raise ValueError(
            f"{name}: made for a model of width {stored.width}, got one of width {width}"
        )
    if stored.tokenizer != tokenizer_sha256(ours):
        raise ValueError(
            f"{name}: got another tokenizer than the one that the facts were taught with, "
            "expected the same vocabulary: subjects are found by their token ids"
        )
    vocab_size = _vocab_size_of(model, ours)
    ids = (token for entry in stored.entries for each in entry.spellings for token in each)
    if (largest := max(ids, default=0)) >= vocab_size:
        raise ValueError(f"{name}: got token id {largest}, expected ids below {vocab_size}")
    memory = FactMemory(
        stored.entries,
        ours,
        stored.layers,
        vocab_size,
        width,
        streams_of(model),
        scales=scales,
    )
    memory.mount(model)
    memory.set_rows(range(len(stored.entries)), stored.rows)
    return memory


def _read(path: str | Path) -> tuple[dict[str, Any], int, dict[str, Tensor]]:
    """Returns a memory file's config, width and tensors.

    ValueError, before anything large is allocated, where they do not agree.
    """
    header, tensors = read_tensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no memory: got format {header.get('format')!r}, expected {FORMAT!r}"
        )
    try:
        about = json.loads(header["memory"])
        config = about["config"]
        width = int(about["width"])
        least = sum(config["rows_per_head"]) * config["heads"]
        for table_index in range(len(config["layers"])):
            if len(tensors[f"tables.{table_index}.weight"]) < least:
                raise ValueError(
                    f"table {table_index} has fewer than the {least} rows of its config"
                )
        assert tensors["engrams.0.value_proj.weight"].is_floating_point()
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path} is no memory that Memory.save wrote: {error!r}") from error
    return config, width, tensors


def find_blocks(host: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """Returns the module whose forward runs the blocks, and the blocks.

    ValueError for what is not a causal model.
    """
    config = getattr(host, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    count = getattr(text, "num_hidden_layers", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"attach: got {type(host).__name__}, an encoder and a decoder, expected a causal model"
        )
    for module in host.modules():
        for child in module.children():
            of_text = type(getattr(module, "config", None)) is type(text)
            if of_text and isinstance(child, nn.ModuleList) and len(child) == count:
                return module, child
    raise ValueError(
        f"attach: found no list of {count} blocks in {type(host).__name__}, "
        "expected a causal model of transformers"
    )


class _Reached(Exception):
    """Carries the shape of the hidden states that reached a block."""


def _check_hidden(model: nn.Module, body: nn.Module, blocks: nn.ModuleList) -> None:
    """Checks that the first block takes [batch, time, width], or its streams.

    The check is a call of one token that stops at the block. ValueError for another shape. A model
    that cannot run such a call passes.
    """

    def stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Reached(list((args[0] if args else kwargs["hidden_states"]).shape))

    hook = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    shape = None
    width = width_of(model)
    streams = streams_of(model)
    try:
        # A host in training mode draws random numbers for its dropout.
        with torch.no_grad(), torch.random.fork_rng():
            body.forward(
                input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(body.parameters()).device)
            )
    except _Reached as reached:
        (shape,) = reached.args
    except Exception:
        return
    finally:
        hook.remove()
    forms = [[1, 1, *form] for form in _forms(width, streams)]
    if shape is not None and shape not in forms:
        got = f"{type(model).__name__}, whose blocks take hidden states {shape} for one token"
        expected = " or ".join(map(str, forms))
        raise ValueError(
            f"attach: got {got}, expected {expected}: other residual streams take no memory"
        )


def _forms(width: int, streams: int) -> list[list[int]]:
    """Returns the shapes that the hidden states of a token may have."""
    if streams == 1:
        return [[width]]
    return [[streams, width], [streams * width]]


def _adapters(host: nn.Module) -> tuple[str, ...]:
    """Returns the names of PEFT's adapters on a model."""
    return tuple(getattr(host, "peft_config", ()))


def width_of(model: Any) -> int:
    """Returns the width of the hidden states, which in some models is not that of the embedding."""
    return model.config.get_text_config(decoder=True).hidden_size


def streams_of(model: Any) -> int:
    """Returns the number of residual streams, by the fields of DeepSeek-V4 and of Qwen4-Exp."""
    config = model.config.get_text_config(decoder=True)
    counts = (getattr(config, name, None) for name in ("hc_mult", "hc_count"))
    return next((count for count in counts if count is not None), 1)


def _vocab_size_of(model: Any, tokenizer: Tokenizer) -> int:
    """Returns the rows of the model's embedding. ValueError if the tokenizer has more ids."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"tokenizer: got {tokenizer.vocab_size} ids, "
            f"expected at most the model's {rows}: is it the model's own?"
        )
    return rows


def _valid(kwargs: dict[str, Any], ids: Tensor, past: int) -> Tensor | None:
    """Returns which of the new tokens are valid, from the host's attention mask; None without one.

    A valid token attends to itself.
    """
    mask = kwargs.get("attention_mask")
    time = ids.shape[1]
    if isinstance(mask, dict):  # one for each kind of attention; in all a token attends to itself
        masks = (mask.get("full_attention"), *mask.values())
        mask = next((each for each in masks if each is not None), None)
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= time:
        return mask[:, -time:].bool()
    if (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[2] == time
        and mask.shape[3] >= past + time
    ):
        ours = mask[:, 0, :, past : past + time].diagonal(dim1=1, dim2=2)
        return (ours if ours.dtype == torch.bool else ours >= 0).expand(ids.shape)
    got = f"{type(mask).__name__} {list(mask.shape) if isinstance(mask, Tensor) else ''}".strip()
    raise ValueError(
        f"memory: got attention_mask {got}, expected [batch, cached + new tokens], or none"
    )


def _documents(kwargs: dict[str, Any], ids: Tensor) -> Tensor | None:
    """Returns document ids where position ids restart within a sequence; None where they do not."""
    positions = kwargs.get("position_ids")
    if (
        positions is None
        or kwargs.get("attention_mask") is not None
        or positions.shape[1:] != ids.shape[1:]
    ):
        return None
    begins = nn.functional.pad(positions.diff(dim=-1) != 1, (1, 0))
    return begins.long().cumsum(-1).expand(ids.shape) if bool(begins.any()) else None
