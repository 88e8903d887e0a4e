"""Containers for the state that layers keep between calls.

A cache has a length for every sequence of the batch: `Past.lengths` counts the tokens that are
cached. The containers only store values; a context says which columns the new tokens of a call get.
A sequence begins at column 0 in every container, so that sequences of different lengths need no
padding in front. Columns from a sequence's length on hold nothing that is ever read.

    Appended   all tokens                       keys, values, latents, token ids
    Recent     the last few tokens              values that a convolution looks back at
    Blocks     one value per complete block     layers/sparse.py
    Recurrent  a state that all tokens change   layers/delta_net.py
    Ties       whether equal scores decided     layers/dsa.py

Containers that forget tokens have a `slack`, how many of the last tokens a crop may remove.

Nothing here carries gradients: a cache is for inference. What an `append` or `extend` returns is
valid until the next call of the same container.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@runtime_checkable
class NewTokens(Protocol):
    """Defines what a container reads of the new tokens of a call; Context has it."""

    @property
    def past(self) -> int:
        """Tokens cached before in every sequence, or in the longest one."""
        ...

    @property
    def starts(self) -> Int[Tensor, " B"] | None:
        """Tokens cached before in each sequence; None if all have `past`."""
        ...

    @property
    def lengths(self) -> Int[Tensor, " B"] | None:
        """Valid new tokens of each sequence; None if all of them are."""
        ...


# Of the sequences of a batch, and of those that join it.
Lengths = tuple[Sequence[int], Sequence[int]]


@runtime_checkable
class State(Protocol):
    """Defines the methods of every container."""

    def select(self, index: Int[Tensor, " B"], length: int) -> None:
        """Keeps these sequences of the batch, in this order; none is longer than `length`."""
        ...

    def join(self, other: Any, lengths: Lengths) -> None:
        """Appends the sequences of `other` to the batch; `lengths` are those of both."""
        ...

    def load(self, other: Any, length: int) -> None:
        """Becomes a copy of the first `length` tokens of `other`."""
        ...

    def clear(self) -> None:
        """Frees the memory; the container is as new."""
        ...


@runtime_checkable
class Forgetting(State, Protocol):
    """Defines a container that forgets what came before its last tokens."""

    slack: int  # how many tokens it can go back


@runtime_checkable
class Recurring(Forgetting, Protocol):
    """Defines a container whose state is of all tokens, which is cut only where it was stored."""

    every: int | None  # the least number of tokens between two stored states
    multiple: int  # of which their lengths are multiples
    earlier: dict[int, Tensor]  # states of one sequence, by its length


@runtime_checkable
class NotesTies(State, Protocol):
    """Defines a container that says whether a selection depended on the columns of its call."""

    tied: bool


class BatchMemory:
    """Memory for more sequences than the batch has; `buffer` [B, C, ...] is the first B.

    So sequences join and leave without a copy of those that stay. The memory doubles when it is
    full.
    """

    buffer: Tensor | None = None
    _memory: Tensor | None = None  # [R, C, ...], R >= B

    @property
    def empty(self) -> bool:
        """Returns whether nothing was stored since the start, or since `clear`."""
        return self.buffer is None

    def clear(self) -> None:
        """Frees the memory; the next call allocates it for a batch of any size."""
        self.buffer = self._memory = None

    def _store_in(self, memory: Tensor, batch: int) -> Tensor:
        """Replaces the memory [R, C, ...]; returns its first `batch` sequences."""
        self._memory = memory
        self.buffer = memory[:batch]
        return self.buffer

    def _more_sequences(self, count: int) -> Tensor:
        """Appends `count` sequences of zeros to the batch; returns all."""
        assert self.buffer is not None and self._memory is not None
        batch = len(self.buffer)
        memory = self._memory
        if batch + count > len(memory):
            size = max(batch + count, 2 * len(memory))
            memory = memory.new_zeros(size, *memory.shape[1:])
            memory[:batch] = self.buffer
        else:
            # They may hold what a sequence that left has left: NaN, in the worst case.
            memory[batch : batch + count] = 0
        return self._store_in(memory, batch + count)

    def _keep_sequences(self, index: Int[Tensor, " B"]) -> None:
        """Keeps these sequences, in this order; one that stays where it is isn't copied."""
        assert self.buffer is not None and self._memory is not None
        index = index.to(self.buffer.device)
        memory = self._memory
        if len(index) > len(memory):
            self._store_in(self.buffer.index_select(0, index), len(index))
            return
        moved = (index != torch.arange(len(index), device=index.device)).nonzero()[:, 0]
        if len(moved):
            memory[moved] = memory[index[moved]]
        self._store_in(memory, len(index))


class Appended(BatchMemory):
    """Stores all tokens since the start in a buffer [B, capacity, ...].

    The buffer is allocated at the first append, for `capacity` tokens, and doubles when it is full.
    `before` more columns in front of the first token hold `fill`, for layers that look back.
    """

    def __init__(self, capacity: int = 0, before: int = 0, fill: int = 0):
        self.capacity = capacity
        self.before = before
        self.fill = fill

    def append(self, new: Shaped[Tensor, "B T ..."], ctx: NewTokens) -> Shaped[Tensor, "B L ..."]:
        """Stores `new` behind the tokens of each sequence; returns all as a view, L = past + T.

        Columns of a shorter sequence beyond its own new tokens hold older values or zeros.
        """
        end = ctx.past + new.shape[1]
        stored = self.reserve(new, end)[:, self.before :]
        if ctx.starts is None:
            stored[:, ctx.past : end] = new.detach()
        else:
            sequences, columns = _token_index(ctx.starts, 0, new.shape[1])
            stored[sequences, columns] = new.detach().to(stored.dtype)
        return stored[:, :end]

    @property
    def stored(self) -> Shaped[Tensor, "B C ..."] | None:
        """Returns what is stored from the first token on, None if nothing is.

        Columns beyond the length of a sequence mean nothing.
        """
        if self.buffer is None or not self.before:
            return self.buffer
        return self.buffer[:, self.before :]

    def reserve(self, like: Shaped[Tensor, "B T ..."], length: int) -> Shaped[Tensor, "B C ..."]:
        """Returns the buffer with space for `length` tokens a sequence, as wide as `like`.

        Token t is at column `before` + t.
        """
        size = self.before + length
        buffer = self.buffer
        if buffer is None or len(buffer) != len(like):
            columns = max(size, self.before + self.capacity, 16)
            buffer = like.new_zeros(len(like), columns, *like.shape[2:])
            buffer[:, : self.before] = self.fill
            self.buffer = self._memory = buffer
        elif buffer.shape[1] < size:
            assert self._memory is not None
            size = max(size, self.before + self.capacity, 2 * buffer.shape[1])
            memory = buffer.new_zeros(len(self._memory), size, *like.shape[2:])
            memory[: len(buffer), : buffer.shape[1]] = buffer
            self._memory, buffer = memory, memory[: len(buffer)]
            self.buffer = buffer
        return buffer

    def window(self, ctx: NewTokens, time: int) -> Shaped[Tensor, "B W ..."]:
        """Returns the last `time` tokens, already stored, and the `before` ones before them."""
        assert self.buffer is not None
        if ctx.starts is None:
            return self.buffer[:, ctx.past : ctx.past + self.before + time]
        return self.buffer[_token_index(ctx.starts, 0, self.before + time)]

    def select(self, index: Int[Tensor, " B"], length: int) -> None:
        """Keeps the sequences `index` of the batch, in this order; `length` is not needed."""
        if self.buffer is not None:
            self._keep_sequences(index)

    def join(self, other: "Appended", lengths: Lengths) -> None:
        """Appends the sequences of `other`; becomes empty if either has stored nothing yet."""
        if self.buffer is None or other.buffer is None:
            self.clear()
            return
        batch = len(self.buffer)
        second = self.before + max(lengths[1])
        self.reserve(self.buffer, max(lengths[1]))
        self._more_sequences(len(other.buffer))[batch:, :second] = other.buffer[:, :second]

    def load(self, other: "Appended", length: int) -> None:
        """Becomes a copy of the first `length` tokens of `other` and of the columns before them."""
        self.clear()
        if other.buffer is not None:
            size = self.before + length
            self.reserve(other.buffer, length)[:, :size] = other.buffer[:, :size]


def _token_index(
    starts: Int[Tensor, " B"], first: int, count: int
) -> tuple[Int[Tensor, "B 1"], Int[Tensor, "B T"]]:
    """Returns (sequences, columns) of the `count` tokens from `first` behind each start."""
    steps = torch.arange(first, first + count, device=starts.device)
    return torch.arange(len(starts), device=starts.device)[:, None], starts[:, None] + steps


class Recent(BatchMemory):
    """Stores the last `count` tokens, and `slack` more so that a cache can be cropped that far.

    Token t is at column t mod (count + slack). Before the first token there are zeros.
    """

    def __init__(self, count: int, slack: int = 64):
        self.count = count
        self.slack = slack

    def extend(self, new: Shaped[Tensor, "B T ..."], ctx: NewTokens) -> Shaped[Tensor, "B L ..."]:
        """Stores `new`; returns the `count` tokens before it and `new` itself, L = count + T."""
        result = torch.cat([self.before(ctx, new), new], dim=1)
        self.store(new.detach(), ctx)
        return result

    def before(self, ctx: NewTokens, like: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "B C ..."]:
        """Returns the last `count` tokens before the new ones; `like` has their shape."""
        size = self.count + self.slack
        count = self.count
        buffer = self.buffer
        if buffer is None or len(buffer) != len(like):
            buffer = self.buffer = self._memory = like.new_zeros(len(like), size, *like.shape[2:])
        if ctx.starts is not None:
            columns = ctx.starts[:, None] + torch.arange(-count, 0, device=buffer.device)
            missing = (columns < 0).view(*columns.shape, *[1] * (buffer.dim() - 2))
            sequences = torch.arange(len(buffer), device=buffer.device)[:, None]
            return buffer[sequences, columns % size].masked_fill(missing, 0)
        if ctx.past < count:
            missing = torch.zeros_like(buffer[:, ctx.past : count])
            return torch.cat([missing, buffer[:, : ctx.past]], 1)
        column = (ctx.past - count) % size
        if column + count <= size:
            return buffer[:, column : column + count]
        return torch.cat([buffer[:, column:], buffer[:, : column + count - size]], 1)

    def tokens_from(self, starts: Int[Tensor, " B"], count: int) -> Shaped[Tensor, "B N ..."]:
        """Returns `count` tokens of each sequence from its start on.

        Those that are not among its last `count` + `slack` mean nothing.
        """
        assert self.buffer is not None
        sequences, columns = _token_index(starts, 0, count)
        return self.buffer[sequences, columns % self.buffer.shape[1]]

    def store(self, new: Shaped[Tensor, "B T ..."], ctx: NewTokens) -> None:
        """Stores the new tokens in place of the oldest."""
        buffer = self.buffer
        time = new.shape[1]
        size = self.count + self.slack
        if buffer is None or len(buffer) != len(new):
            buffer = self.buffer = self._memory = new.new_zeros(len(new), size, *new.shape[2:])
        # Of more tokens than there is space for only the last valid ones are stored.
        count = min(time, size)
        if ctx.starts is None and ctx.lengths is None:
            column = (ctx.past + time - count) % size
            end = min(size, column + count)
            buffer[:, column:end] = new[:, time - count :][:, : end - column]
            buffer[:, : count - (end - column)] = new[:, time - count + end - column :]
            return
        sequences = torch.arange(len(new), device=new.device)[:, None]
        ends = torch.full_like(sequences, time) if ctx.lengths is None else ctx.lengths[:, None]
        steps = ends - count + torch.arange(count, device=new.device)
        columns = ((ctx.past if ctx.starts is None else ctx.starts[:, None]) + steps) % size
        earlier = (steps < 0).view(*steps.shape, *[1] * (new.dim() - 2))
        latest = new[sequences, steps.clamp_min(0)].to(buffer.dtype)
        buffer[sequences, columns] = torch.where(earlier, buffer[sequences, columns], latest)

    def select(self, index: Int[Tensor, " B"], length: int) -> None:
        """Keeps the sequences `index` of the batch, in this order; `length` is not needed."""
        if self.buffer is not None:
            self._keep_sequences(index)

    def join(self, other: "Recent", lengths: Lengths) -> None:
        """Appends the sequences of `other`, of any slack; empty if either stored nothing."""
        if self.buffer is None or other.buffer is None:
            self.clear()
            return
        batch = len(self.buffer)
        self._copy(other.buffer, self._more_sequences(len(other.buffer))[batch:], lengths[1])

    def load(self, other: "Recent", length: int) -> None:
        """Becomes a copy of the last tokens of `other` before `length` that both have space for."""
        self.clear()
        if other.buffer is not None:
            self.before(_Start(), other.buffer)
            assert self.buffer is not None
            self._copy(other.buffer, self.buffer, [length] * len(self.buffer))

    @staticmethod
    def _copy(source: Tensor, target: Tensor, lengths: Sequence[int]) -> None:
        """Copies the last tokens that both have space for, up to each length."""
        sizes = (source.shape[1], target.shape[1])
        device = source.device
        ends = torch.tensor(list(lengths), device=device)[:, None]
        columns = ends - min(sizes) + torch.arange(min(sizes), device=device)
        sequences = torch.arange(len(source), device=device)[:, None]
        target[sequences, columns % sizes[1]] = source[sequences, columns % sizes[0]]


class _Start:
    """Stands for the context of a call before any token."""

    past = 0
    starts = None
    lengths = None


class Past:
    """Counts the cached tokens of each sequence and stores their document ids, if there are any."""

    def __init__(self, batch: int = 1, capacity: int = 0):
        self.batch = batch
        self.capacity = capacity
        self.reset()

    def reset(self) -> None:
        """Removes all tokens of all sequences, and their document ids."""
        self.lengths = [0] * self.batch
        # The longest that each sequence has been, as far as containers may have forgotten for it.
        self.longest = [0] * self.batch
        self.document_ids = Appended(self.capacity)

    @property
    def length(self) -> int:
        """Number of tokens cached in the longest sequence."""
        return max(self.lengths)

    @property
    def named(self) -> bool:
        """Whether any call has given document ids."""
        return not self.document_ids.empty

    def starts(self, device: torch.device | str) -> Int[Tensor, " B"] | None:
        """Returns the number of tokens cached in each sequence; None if all have the same."""
        if min(self.lengths) == max(self.lengths):
            return None
        return torch.tensor(self.lengths, device=device)

    clear = reset

    def take(self, batch: int) -> None:
        """Checks the size of a call's batch; an empty cache takes one of any size."""
        if batch == self.batch:
            return
        if self.length:
            raise ValueError(
                f"got a batch of {batch}, expected the {self.batch} sequences that are cached"
            )
        self.batch = batch
        self.reset()

    def append(self, counts: Sequence[int]) -> None:
        """Counts new tokens, so many in each sequence."""
        pairs = list(zip(self.lengths, counts, strict=True))
        self.lengths = [length + count for length, count in pairs]
        self.longest = [max(pair) for pair in zip(self.longest, self.lengths, strict=True)]

    def crop(self, counts: Sequence[int]) -> None:
        """Removes the last tokens, so many of each sequence."""
        for length, count in zip(self.lengths, counts, strict=True):
            if not 0 <= count <= length:
                raise ValueError(
                    f"crop: got {count} tokens to remove, expected 0 to the {length} cached"
                )
        self.lengths = [length - count for length, count in zip(self.lengths, counts, strict=True)]
        self.longest = [
            longest if length else 0
            for longest, length in zip(self.longest, self.lengths, strict=True)
        ]

    def select(self, sequences: Sequence[int], index: Int[Tensor, " B"]) -> None:
        """Keeps these sequences, in this order; `index` holds the same numbers."""
        self.document_ids.select(index, self.length)
        self.lengths = [self.lengths[sequence] for sequence in sequences]
        self.longest = [self.longest[sequence] for sequence in sequences]
        self.batch = len(sequences)

    def join(self, other: "Past") -> None:
        """Appends the sequences of another batch."""
        if self.named or other.named:
            raise ValueError(
                "join: got a cache of packed documents, expected one document a sequence"
            )
        self.lengths = self.lengths + other.lengths
        self.longest = self.longest + other.longest
        self.batch += other.batch


class Bundle:
    """Groups several containers as the fields of a dataclass.

    A field is a container, None, or a tuple of those. Each method applies to all of them.
    """

    @property
    def parts(self) -> dict[str, Any]:
        """The fields by name."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {each.name: getattr(self, each.name) for each in fields}

    def states(self) -> list[Any]:
        """Returns the containers, including those in tuples and bundles."""
        containers: list[Any] = []
        for container in self.parts.values():
            for state in container if isinstance(container, tuple) else (container,):
                containers += state.states() if isinstance(state, Bundle) else [state]
        return [state for state in containers if state is not None and not isinstance(state, Past)]

    def select(self, index: Int[Tensor, " B"], length: int) -> None:
        """Keeps the sequences `index` in every part."""
        for state in self.states():
            state.select(index, length)

    def join(self, other: "Bundle", lengths: Lengths) -> None:
        """Appends the sequences of `other` in every part."""
        for state, more in zip(self.states(), other.states(), strict=True):
            state.join(more, lengths)


@dataclass(eq=False)
class BlockCache(Bundle):
    """The cache of one block: that of its attention, and of Engram's convolution."""

    attention: Any  # what the attention's new_cache returns: MLACache, GQACache, CSACache ...
    engram: Any = None  # Recent, or what `attach` uses in its place


@dataclass(eq=False)
class DraftCache(BlockCache):
    """The cache of one MTP depth, which counts its own tokens."""

    past: Past = field(kw_only=True)


def _tensors_of(state: Any) -> Iterator[Tensor]:
    """Yields the tensors of a container and of the containers in it."""
    for value in list(vars(state).values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from (tensor for tensor in value.values() if isinstance(tensor, Tensor))
        elif isinstance(value, State):
            yield from _tensors_of(value)


class Cache:
    """The cache of a model: a bundle per block, past tokens, last ids, and the caches of MTP.

    select(index) keeps or reorders the sequences of the batch, join(other) appends the sequences of
    another cache, crop(k) removes the last k tokens, and reset() removes all. A draft's bundle has
    a `past` of its own, because every depth of MTP is called separately.
    """

    def __init__(
        self,
        layers: Sequence[BlockCache],
        past: Past,
        ids: Appended | None = None,
        drafts: Sequence[DraftCache] = (),
    ) -> None:
        self.layers = tuple(layers)
        self.past = past
        self.ids = ids
        self.drafts = tuple(drafts)
        # Looked up at every step: the containers are many, these few or none. Both lists are made
        # once, of what the layers' new_cache returned. A container that replaces one of these later
        # is in neither; context_parallel.py does that, and never crops or loads such a cache.
        self._ties = [state for state in self.states() if isinstance(state, NotesTies)]
        self._forgetting = [state for state in self.states() if isinstance(state, Forgetting)]
        # Ids that are likely to follow, and by block the rows that are being fetched for them.
        self.announced: list[tuple[Tensor, dict[int, Any]]] = []

    @property
    def length(self) -> int:
        """Number of tokens cached in the longest sequence."""
        return self.past.length

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens cached in each sequence."""
        return tuple(self.past.lengths)

    def states(self) -> list[Any]:
        """Returns the containers of all blocks, without those of drafts."""
        states = [state for layer in self.layers for state in layer.states()]
        return states if self.ids is None else [self.ids, *states]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory of all containers, whether a token is stored there yet or not."""
        return sum(self.storages().values())

    def storages(self) -> dict[int, int]:
        """Returns the bytes of each storage of all containers, by its address."""
        drafts = [state for draft in self.drafts for state in draft.states()]
        storages: dict[int, int] = {}
        for state in [*self.states(), *drafts]:
            for tensor in _tensors_of(state):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return storages

    def select(self, index: Int[Tensor, " B2"]) -> None:
        """Keeps the sequences `index` of the batch, in this order; one may occur several times.

        Rows of tables that are being fetched for announced ids are dropped.
        """
        sequences = index.tolist()
        self.announced = []
        for state in self.states():
            state.select(index, self.length)
        self.past.select(sequences, index)
        for draft in self.drafts:
            draft.select(index, draft.past.length)
            if draft.past.length:
                draft.past.select(sequences, index)
            else:
                draft.past.take(len(sequences))

    def join(self, other: "Cache") -> None:
        """Appends the sequences of `other`, a cache of the same model.

        MTP has been called with both or with neither. ValueError, with nothing joined, if documents
        are packed or only one of them has tokens.
        """
        if min(self.length, other.length) == 0 < max(self.length, other.length):
            raise ValueError(
                f"join: got caches of {self.length} and {other.length} tokens, expected tokens in "
                "both: run the model on the empty one first"
            )
        lengths = self.lengths, other.lengths
        self.past.join(other.past)
        for state, more in zip(self.states(), other.states(), strict=True):
            state.join(more, lengths)
        for draft, more in zip(self.drafts, other.drafts, strict=True):
            draft.join(more, (draft.past.lengths, more.past.lengths))
            draft.past.join(more.past)
        self.announced = []

    def load(self, other: "Cache", length: int) -> None:
        """Becomes a copy of the first `length` tokens of `other`, a cache of the same model.

        Of one sequence without documents, which can be cropped to `length`; drafts get as many of
        these tokens as those of `other` have.
        """
        assert other.past.batch == 1 and not other.past.named
        assert other.can_load(length)
        self.reset()
        self.past.take(1)
        for state, source in zip(self.states(), other.states(), strict=True):
            state.load(source, length)
        # Nothing before what the other has forgotten can be cropped to here, either.
        forgotten = min(other.oldest, length) + (self._slack or 0) if other.oldest else 0
        self.past.lengths, self.past.longest = [length], [max(length, forgotten)]
        for draft, source in zip(self.drafts, other.drafts, strict=True):
            read = min(length, source.past.length)
            draft.past.take(1)
            draft.past.lengths = [read]
            draft.past.longest = [read]
            for state, stored in zip(draft.states(), source.states(), strict=True):
                state.load(stored, read)

    @property
    def tied(self) -> bool:
        """Whether the selection of cached tokens depended on the number of columns of its call."""
        return any(state.tied for state in self._ties)

    @property
    def oldest(self) -> int:
        """The least number of tokens but 0 that the longest sequence can be cropped to."""
        slack = self._slack
        return 0 if slack is None else max(0, max(self.past.longest) - slack)

    def can_load(self, length: int) -> bool:
        """Returns whether `load` can take the first `length` tokens, of one sequence."""
        longest = max(self.past.longest)
        return 0 <= length <= self.length and all(
            longest - length <= state.slack
            or (isinstance(state, Recurring) and length in state.earlier)
            for state in self._forgetting
        )

    @property
    def _slack(self) -> int | None:
        """How many tokens every container can go back; None: any number."""
        return min((state.slack for state in self._forgetting), default=None)

    def crop(self, k: int | Sequence[int]) -> None:
        """Removes the last k tokens, of every sequence or so many of each.

        Drafts that are longer are cropped to the same length. ValueError, with nothing removed, if
        a layer has forgotten what came before them.
        """
        past = self.past
        counts = [k] * past.batch if isinstance(k, int) else list(k)
        slack = self._slack
        for length, longest, count in zip(past.lengths, past.longest, counts, strict=True):
            far = longest - (length - count)
            if slack is not None and count < length and far > slack:
                expected = f"expected 0 to {max(0, slack - (longest - length))}, or all {length}"
                raise ValueError(
                    f"crop: got {count} tokens to remove, {expected}: "
                    f"reserve_slack({far}) of an empty cache, and it can go back as far"
                )
        past.crop(counts)
        self.announced = []
        for draft in self.drafts:
            if not draft.past.length:
                continue
            extra = zip(draft.past.lengths, past.lengths, strict=True)
            draft.past.crop([max(0, more - length) for more, length in extra])

    def _draft_states(self) -> list[Any]:
        """Returns the containers of every MTP depth."""
        return [state for draft in self.drafts for state in draft.states()]

    def reserve_slack(self, k: int) -> None:
        """Lets `crop` go back k tokens; the default is 64. The cache must be empty.

        It costs the memory of k tokens of all that forgets: Engram's values, the keys of a window,
        the inputs of compressors, and 2 k tokens of what delta net reads.
        """
        if k < 0:
            raise ValueError(f"reserve_slack: got {k}, expected at least 0 tokens")
        if self.length:
            raise ValueError(
                f"reserve_slack: got a cache of {self.length} tokens, expected an empty one: "
                "reset it first"
            )
        for state in [*self.states(), *self._draft_states()]:
            if isinstance(state, Forgetting):
                state.slack = k
                state.clear()

    def reserve_prefixes(self, k: int, every: int, multiple: int) -> None:
        """Lets `load` take any beginning of a sequence of k tokens. The cache must be empty.

        Where a layer keeps a state of all tokens, it can be cut only where that is kept: at lengths
        that are a multiple of `multiple`, at least `every` tokens apart.
        """
        assert not self.length
        for state in [*self.states(), *self._draft_states()]:
            if isinstance(state, Recurring):
                state.every = every
                state.multiple = multiple
            elif isinstance(state, Forgetting):
                state.slack = k
                state.clear()

    def crop_drafts(self, counts: Sequence[int]) -> None:
        """Removes the last tokens of every MTP depth, because their input was itself a draft."""
        for draft in self.drafts:
            pairs = zip(counts, draft.past.lengths, strict=True)
            draft.past.crop([min(pair) for pair in pairs])

    def reset(self) -> None:
        """Removes all tokens and frees the buffers; the next batch may have another size."""
        self.announced = []
        for past in (self.past, *(draft.past for draft in self.drafts)):
            past.reset()
        for state in [*self.states(), *self._draft_states()]:
            state.clear()
