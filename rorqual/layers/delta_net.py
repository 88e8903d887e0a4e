"""Gated delta net: linear attention whose state forgets, and corrects what it recalls of a key.

    q, k, v = silu(conv(W_qkv x))            causal and depthwise, then by head; q and k of length 1
    g       = -exp(A) softplus(W_a x + dt)   log of how much of the state stays
    beta    = sigmoid(W_b x)                 how far the value of a key is corrected

    S_t     = e^g_t S_(t-1) + k_t (beta_t (v_t - (e^g_t S_(t-1))^T k_t))^T     [key, value] a head
    o_t     = S_t^T q_t / sqrt(key width)
    out     = W_o (norm(o) * gate(W_z x))

Each key head serves value_heads / key_heads consecutive value heads. `step` is that recurrence for
one token. `chunked` computes it for CHUNK tokens at a time: with c_i = g_1 + .. + g_i and
D_ij = e^(c_i - c_j) for i >= j, 0 above,

    (I + tril(beta K K^T * D, -1)) [U | W] = beta [V | e^c K]           one triangular solve
    V'   = U - W S                    what is written, given the state S before the chunk
    O    = (e^c Q) S + (Q K^T * D) V'
    S   <- e^c_C S + (e^(c_C - c) K)^T V'

Where a document begins nothing before it is read: D is 0 across documents, e^c for tokens of
another document than the state's. All of it is float32. Gated Delta Networks, arXiv:2412.06464; the
chunked form of the delta rule, 2406.06484.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.cache import Bundle, Lengths, NewTokens, Recent
from rorqual.layers.context import Attended, Context
from rorqual.layers.convolution import convolve
from rorqual.layers.norm import as_float32
from rorqual.model_config import DeltaNetConfig as DeltaNetConfig

CHUNK = 64  # tokens of a triangular solve
MAX_STATES = 16  # of one sequence that can be cropped far back
NORM_EPS = 1e-6  # under the root of the length of queries and keys


class Writes(NamedTuple):
    """What T tokens do to the states of H = G R heads, R of them for each of G key heads.

    All zeros leave a state as it is.
    """

    key: Float[Tensor, "B T G K"]
    value: Float[Tensor, "B T H V"]
    decay: Float[Tensor, "B T H"]  # g, at most 0
    beta: Float[Tensor, "B T H"]
    begins: Float[Tensor, "B T"]  # 1 where a document begins, else 0

    def pack(self) -> Float[Tensor, "B T F"]:
        """Returns the fields of each token side by side."""
        key, value, decay, beta, begins = self
        return torch.cat([key.flatten(2), value.flatten(2), decay, beta, begins[..., None]], dim=-1)

    def unpack(self, packed: Float[Tensor, "B T2 F"]) -> "Writes":
        """Returns the fields that `pack` of writes of these widths put side by side."""
        heads = self.key.shape[2:]
        widths = self.value.shape[2:]
        sizes = (heads.numel(), widths.numel(), widths[0], widths[0], 1)
        key, value, decay, beta, begins = packed.split(sizes, dim=-1)
        return Writes(
            key.unflatten(-1, heads), value.unflatten(-1, widths), decay, beta, begins[..., 0]
        )


class Chunks(NamedTuple):
    """What `chunked` returns: outputs, the state after all tokens, and those between chunks."""

    out: Float[Tensor, "B T H V"] | None
    state: Float[Tensor, "B H K V"]
    # After the number of chunks that was asked for, of each sequence.
    between: Float[Tensor, "B H K V"] | None
    # After each number of chunks in `ends`.
    states: Sequence[Float[Tensor, "B H K V"]] = ()


def step(
    query: Float[Tensor, "B 1 G K"], writes: Writes, state: Float[Tensor, "B H K V"]
) -> tuple[Float[Tensor, "B 1 H V"], Float[Tensor, "B H K V"]]:
    """Computes the output of one token and the state after it."""
    groups = query.shape[2]
    stays = writes.decay[:, 0].exp() * (1.0 - writes.begins)
    state = (state * stays[..., None, None]).unflatten(1, (groups, -1))  # [B, G, R, K, V]
    key, query = (x[:, 0, :, None, None] for x in (writes.key, query))  # [B, G, 1, 1, K]
    value, beta = (x[:, 0].unflatten(1, (groups, -1)) for x in (writes.value, writes.beta))
    with torch.autocast(state.device.type, enabled=False):
        written = (value - (key @ state).squeeze(-2)) * beta[..., None]
        state = state + key.mT * written[..., None, :]
        out = (query @ state).squeeze(-2) * query.shape[-1] ** -0.5
    return out.flatten(1, 2)[:, None], state.flatten(1, 2)


def chunked(
    query: Float[Tensor, "B T G K"] | None,
    writes: Writes,
    state: Float[Tensor, "B H K V"],
    chunks: Int[Tensor, " B"] | None = None,
    ends: Sequence[int] = (),
) -> Chunks:
    """Computes outputs and the state after T tokens, CHUNK tokens at a time.

    Without a query only the state is computed. `between` is the state after `chunks` chunks of each
    sequence, None if that is None; `states` are those after each number of chunks in `ends`.
    """
    _, time, groups, width = writes.key.shape
    size = min(CHUNK, time)
    beyond = -time % size
    # [B, G, R, N, C, X], zeros after the last token
    inputs = writes.key, writes.value, writes.decay[..., None], writes.beta[..., None]
    key, value, decay, beta, *queries = (
        F.pad(x, (0, 0, 0, 0, 0, beyond))
        .unflatten(2, (groups, -1))
        .unflatten(1, (-1, size))
        .permute(0, 3, 4, 1, 2, 5)
        for x in (*inputs, *(() if query is None else (query,)))
    )
    total = decay[..., 0].cumsum(-1)
    # Tokens are of one document if as many documents begin up to each of them, and of the state's
    # document if none begins.
    begun = F.pad(writes.begins, (0, beyond)).unflatten(1, (-1, size)).cumsum(-1)[:, None, None]
    apart = torch.ones(size, size, dtype=torch.bool, device=key.device).triu(1)
    apart = apart | (begun[..., None] != begun[..., None, :])
    decays = (total[..., None] - total[..., None, :]).masked_fill(apart, -torch.inf).exp()  # D
    since_state = (total.exp() * (begun == 0))[..., None]  # [B, G, R, N, C, 1]

    with torch.autocast(state.device.type, enabled=False):
        raised = beta * key
        sides = torch.cat([beta * value, since_state * raised], dim=-1)
        system = (raised @ key.mT) * decays
        solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
        written, predicted = solved.split([value.shape[-1], width], dim=-1)
        until_end = (decays[..., -1, :, None] * key).mT  # [B, G, R, N, K, C]
        stays = since_state[..., -1:, :]
        # Of the query, if there is one.
        scores = [(x @ key.mT) * decays * width**-0.5 for x in queries]
        reads = [x * since_state * width**-0.5 for x in queries]
        state, outs = state.unflatten(1, (groups, -1)), []  # [B, G, R, K, V]
        between = state
        states = []
        for n in range(total.shape[3]):
            new = written[:, :, :, n] - predicted[:, :, :, n] @ state
            for score, read in zip(scores, reads, strict=True):
                outs.append(read[:, :, :, n] @ state + score[:, :, :, n] @ new)
            state = stays[:, :, :, n] * state + until_end[:, :, :, n] @ new
            if n + 1 in ends:
                states.append(state.flatten(1, 2))
            if chunks is not None:
                wanted = (chunks == n + 1)[:, None, None, None, None]
                between = torch.where(wanted, state, between)
    out = None
    if query is not None:
        out = torch.stack(outs, dim=3).flatten(3, 4)[..., :time, :]  # [B, G, R, T, V]
        out = out.flatten(1, 2).transpose(1, 2)
    between_states = None if chunks is None else between.flatten(1, 2)
    return Chunks(out, state.flatten(1, 2), between_states, states)


class Recurrent:
    """Stores the state after all tokens, and what it takes to go back `slack` of them.

    That is an earlier state, `base`, and the writes of the tokens since. A call after a crop rolls
    it forward to the last token that is left.

    A copy can be cut further back, where `every` is not None: to the lengths in `earlier`, whose
    states are kept, at least `every` tokens apart, each a multiple of `multiple`. There are at most
    MAX_STATES: of more, every second is dropped, and `every` doubles.
    """

    def __init__(self, slack: int = 64):
        self.slack = slack
        self.every: int | None = None
        self.multiple = 1
        self.clear()

    def clear(self) -> None:
        """Frees the states and writes."""
        self.state: Tensor | None = None  # [B, H, K, V]
        self.base: Tensor | None = None
        self.lengths: Tensor | None = None  # [B], tokens that `state` has read
        self.base_lengths: Tensor | None = None
        self.writes = Recent(0, 2 * self.slack + CHUNK)
        self.earlier: dict[int, Tensor] = {}  # states of one sequence, by its length

    def before(self, writes: Writes, ctx: NewTokens) -> Float[Tensor, "B H K V"]:
        """Returns the state before the new tokens, whose writes have the shapes of `writes`."""
        batch, _, heads, width = writes.value.shape
        device = writes.value.device
        starts = torch.full((batch,), ctx.past, device=device) if ctx.starts is None else ctx.starts
        if self.state is None or len(self.state) != batch:
            self.clear()
            self.state = writes.value.new_zeros(batch, heads, writes.key.shape[-1], width)
            self.base = self.state
            self.lengths = starts * 0
            self.base_lengths = starts * 0
        assert self.base is not None and self.base_lengths is not None
        assert self.lengths is not None
        if not torch.equal(self.lengths, starts):
            # Where nothing is left, nothing before is read.
            empty = starts == 0
            self.base_lengths = self.base_lengths.masked_fill(empty, 0)
            self.base = self.base.masked_fill(empty[:, None, None, None], 0.0)
            self.state = self._roll(writes, starts - self.base_lengths)
            self.lengths = starts
            # States of tokens that were cropped are of another text.
            least = int(starts.min())
            self.earlier = {n: state for n, state in self.earlier.items() if n <= least}
        return self.state

    def _roll(self, like: Writes, counts: Int[Tensor, " B"]) -> Float[Tensor, "B H K V"]:
        """Returns the state `counts` tokens after `base`, computed from the stored writes."""
        assert self.base is not None and self.base_lengths is not None
        longest = int(counts.max())
        if self.writes.empty or not longest:
            return self.base
        steps = torch.arange(longest, device=counts.device)
        packed = self.writes.tokens_from(self.base_lengths, longest)
        packed = packed.masked_fill((steps >= counts[:, None])[..., None], 0.0)
        return chunked(None, like.unpack(packed), self.base).state

    def chunks(self, writes: Writes, ctx: NewTokens) -> Int[Tensor, " B"]:
        """Returns after how many chunks of the new tokens the state is wanted: the next `base`."""
        time = writes.key.shape[1]
        counts = writes.begins.new_full((len(writes.key),), time, dtype=torch.long)
        counts = counts if ctx.lengths is None else ctx.lengths
        return (counts - self.slack).clamp_min(0) // min(CHUNK, time)

    def ends(self, writes: Writes, ctx: NewTokens) -> dict[int, int]:
        """Returns after how many chunks of the new tokens states are kept, and their lengths."""
        batch, time = writes.key.shape[:2]
        if self.every is None or batch != 1 or ctx.lengths is not None:
            return {}
        size = min(CHUNK, time)
        last = max(self.earlier, default=0)
        kept_lengths = {}
        for count in range(1, time // size + 1):
            length = ctx.past + count * size
            if length % self.multiple == 0 and length - last >= self.every:
                kept_lengths[count] = last = length
        return kept_lengths

    def keep(self, states: Mapping[int, Float[Tensor, "1 H K V"]]) -> None:
        """Keeps states by their lengths, each more than the last one that is there."""
        # A new dictionary, since another thread may count the bytes of this one.
        earlier = self.earlier | {n: state.detach() for n, state in states.items()}
        while self.every is not None and len(earlier) > MAX_STATES:
            self.every *= 2
            earlier = dict(list(earlier.items())[1::2])
        self.earlier = earlier

    def store(
        self,
        writes: Writes,
        state: Float[Tensor, "B H K V"],
        between: Float[Tensor, "B H K V"],
        ctx: NewTokens,
    ) -> None:
        """Stores the writes of the new tokens, the state after them, and one between chunks."""
        assert self.lengths is not None and self.base is not None
        assert self.base_lengths is not None
        packed = writes.pack().detach()
        chunks = self.chunks(writes, ctx)
        time = writes.key.shape[1]
        counts = torch.full_like(self.lengths, time) if ctx.lengths is None else ctx.lengths
        moves = counts >= self.slack
        self.base = torch.where(moves[:, None, None, None], between.detach(), self.base)
        reached = self.lengths + chunks * min(CHUNK, time)
        self.base_lengths = torch.where(moves, reached, self.base_lengths)
        self.writes.store(packed, ctx)
        self.state = state.detach()
        self.lengths = self.lengths + counts
        # The writes since `base` must not be more than are stored after another short call.
        beyond = self.lengths - self.base_lengths - self.slack
        if bool((beyond >= CHUNK).any()):
            advance = (beyond // CHUNK).clamp_min(0) * CHUNK
            self.base = self._roll(writes, advance)
            self.base_lengths = self.base_lengths + advance

    def select(self, index: Int[Tensor, " B"], length: int) -> None:
        """Keeps the sequences `index` of the batch, in this order."""
        if self.state is None or self.base is None:
            return
        assert self.lengths is not None and self.base_lengths is not None
        index = index.to(self.state.device)
        self.earlier = {}
        self.state = self.state[index]
        self.base = self.base[index]
        self.lengths = self.lengths[index]
        self.base_lengths = self.base_lengths[index]
        self.writes.select(index, length)

    def join(self, other: "Recurrent", lengths: Lengths) -> None:
        """Appends the sequences of `other`; becomes empty if either has read nothing yet."""
        if self.state is None or other.state is None:
            self.clear()
            return
        self.earlier = {}
        for name in ("state", "base", "lengths", "base_lengths"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self.writes.join(other.writes, lengths)

    def load(self, other: "Recurrent", length: int) -> None:
        """Becomes a copy of `other`, which the next call brings to the first `length` tokens."""
        self.clear()
        if other.state is None or other.base_lengths is None:
            return
        if self.every is not None:
            self.earlier = {n: state for n, state in other.earlier.items() if n <= length}
        if length < int(other.base_lengths.min()):
            # No state is written to: the copy shares it.
            self.state = self.base = other.earlier[length]
            self.lengths = self.base_lengths = torch.full_like(other.base_lengths, length)
            return
        for name in ("state", "base", "lengths", "base_lengths"):
            setattr(self, name, getattr(other, name).clone())
        self.writes.load(other.writes, length)


@dataclass(eq=False)
class DeltaNetCache(Bundle):
    """The last inputs of the convolution, and the state."""

    recent: Recent | None  # None if the convolution has one tap
    state: Recurrent


class GatedNorm(nn.Module):
    """Computes norm(x) * gate(z), the norm over each head's width, in float32."""

    def __init__(self, config: DeltaNetConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.value_dim))
        self.eps = config.norm_eps
        self.gate = F.silu if config.gate == "silu" else torch.sigmoid

    def forward(
        self, x: Float[Tensor, "B T H V"], gate: Float[Tensor, "B T H V"]
    ) -> Float[Tensor, "B T H V"]:
        normed = F.rms_norm(as_float32(x), x.shape[-1:], None, self.eps) * as_float32(self.weight)
        return (normed * self.gate(as_float32(gate))).to(gate.dtype)


class DeltaNet(nn.Module):
    """Gated delta net in place of a block's attention.

    Its parameters are named as in Qwen's checkpoints; `conv` is their conv1d.weight without the
    axis of length 1.
    """

    def __init__(self, config: DeltaNetConfig, dim: int):
        super().__init__()
        self.config = config
        values = config.value_heads * config.value_dim
        self.in_proj_qkv = nn.Linear(dim, config.conv_width, bias=False)
        self.in_proj_z = nn.Linear(dim, values, bias=False)
        self.in_proj_b = nn.Linear(dim, config.value_heads, bias=False)
        self.in_proj_a = nn.Linear(dim, config.value_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(config.conv_width, config.kernel))
        self.A_log = nn.Parameter(torch.empty(config.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.value_heads))
        self.norm = GatedNorm(config)
        self.out_proj = nn.Linear(values, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets exp(A) to uniform in (0.01, 16), dt to 1, the convolution to uniform.

        The convolution's bound is 1 / sqrt(kernel), that of torch's convolutions.
        """
        with torch.no_grad():
            self.A_log.copy_(torch.empty(self.A_log.shape).uniform_(0.01, 16).log())
            self.dt_bias.fill_(1.0)
            bound = self.config.kernel**-0.5
            self.conv.copy_(torch.empty(self.conv.shape).uniform_(-bound, bound))

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> DeltaNetCache:
        """Returns an empty cache; its size does not depend on the number of tokens."""
        halo = self.config.kernel - 1
        return DeltaNetCache(Recent(halo) if halo else None, Recurrent())

    def forward(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Attended:
        """Returns the output of the new tokens.

        With `ctx.last_only` only the last token of each sequence has an output.
        """
        query, writes = self.project(hidden, self._convolve(hidden, ctx), ctx)
        cache: Any = None if ctx.cache is None else ctx.cache.attention.state
        out: Tensor | None
        if cache is None:
            state = writes.value.new_zeros(
                len(hidden), *writes.value.shape[2:3], query.shape[-1], writes.value.shape[-1]
            )
            out = chunked(query, writes, state).out
        else:
            state = cache.before(writes, ctx)
            if query.shape[1] == 1:
                out, after = step(query, writes, state)
                between = after if cache.slack == 0 else state
            else:
                ends = cache.ends(writes, ctx)
                chunks = cache.chunks(writes, ctx)
                out, after, between, states = chunked(query, writes, state, chunks, tuple(ends))
                cache.keep(dict(zip(ends.values(), states, strict=True)))
            cache.store(writes, after, between, ctx)
        assert out is not None
        if ctx.last_only:
            out = ctx.last_of(out)
            hidden = ctx.last_of(hidden)
        gate = self.in_proj_z(hidden).unflatten(-1, (self.config.value_heads, -1))
        return Attended(self.out_proj(self.norm(out, gate).flatten(2)))

    def project(
        self, hidden: Float[Tensor, "B T D"], mixed: Float[Tensor, "B T F"], ctx: Context
    ) -> tuple[Float[Tensor, "B T G K"], Writes]:
        """Returns queries of length 1 and what each token writes; padding writes nothing.

        `mixed` are queries, keys and values after the convolution.
        """
        c = self.config
        widths = [c.key_heads * c.key_dim] * 2 + [c.value_heads * c.value_dim]
        query, key, value = as_float32(mixed).split(widths, dim=-1)
        query, key = (_unit(x.unflatten(-1, (c.key_heads, -1))) for x in (query, key))
        step_size = F.softplus(as_float32(self.in_proj_a(hidden)) + as_float32(self.dt_bias))
        decay = -as_float32(self.A_log).exp() * step_size
        beta = as_float32(self.in_proj_b(hidden)).sigmoid()
        if ctx.valid is not None:
            decay, beta = (x.masked_fill(~ctx.valid[..., None], 0.0) for x in (decay, beta))
        begins = torch.zeros_like(decay[..., 0])
        if ctx.document_ids is not None:
            begins = (ctx.positions == 0).to(decay.dtype)
            begins = begins if ctx.valid is None else begins * ctx.valid
        value = value.unflatten(-1, (c.value_heads, -1))
        return query, Writes(key, value, decay, beta, begins)

    def _convolve(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B T F"]:
        """Returns queries, keys and values after the convolution over their last tokens."""
        halo = self.config.kernel - 1
        mixed = self.in_proj_qkv(hidden)
        cache = None if ctx.cache is None else ctx.cache.attention.recent
        if cache is not None:
            mixed = cache.extend(mixed, ctx)
        elif halo:
            mixed = F.pad(mixed, (0, 0, halo, 0))
        document_ids = ctx.documents_before(halo) if halo else None
        return F.silu(convolve(mixed[:, :, None], self.conv[None], document_ids, halo)[:, :, 0])


def _unit(x: Float[Tensor, "B T G K"]) -> Float[Tensor, "B T G K"]:
    """Divides each head's vector by its length."""
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()
