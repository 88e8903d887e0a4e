"""Hashes token ids to the table rows that every Engram layer reads, for all layers at once.

    x      = canonical(ids)                                          equivalent ids become one
    mix_n  = x[t] m_0 xor x[t-1] m_1 xor ... xor x[t-n+1] m_(n-1)    the suffix n-gram, n = 2..N
    row    = offset + mix_n mod prime                                one row a head

Conditional Memory via Scalable Lookup, section 2.2, arXiv:2601.07372.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from rorqual.kernels import kernel
from rorqual.layers.cache import Appended
from rorqual.layers.context import Context
from rorqual.model_config import EngramConfig as EngramConfig
from rorqual.model_config import head_primes as head_primes
from rorqual.model_config import row_totals as row_totals
from rorqual.tables.staging import Staging

# From so many tokens on, the memory of their row ids is kept for the next call.
WORTH_KEEPING = 4096


def draw_multipliers(config: EngramConfig, canonical: int) -> np.ndarray:
    """Draws the odd multipliers, int64 [Lm, N].

    They are 2 r + 1, with r below half = max(1, ((2^63 - 1) // V') // 2), V' = `canonical`.

    numpy: r is uniform, drawn from the seed + 10007 times the block's index.

    splitmix64: r is the i-th number, from 1, modulo half, of the generator whose state is the seed
    + 10007 times the layer's index in the config's list, advanced once before the first.

    For ids below V' no product leaves int64 and no mix is negative. The first is the current
    token's.
    """
    half = max(1, ((2**63 - 1) // canonical) // 2)
    if config.generator == "splitmix64":
        starts = [config.seed + 10007 * index for index in range(len(config.layers))]
        drawn = [
            [_splitmix64(start, i + 2) % half for i in range(config.ngram)] for start in starts
        ]
        return 2 * np.array(drawn, dtype=np.int64) + 1
    streams = [np.random.default_rng(config.seed + 10007 * layer) for layer in config.layers]
    return (
        2 * np.stack([stream.integers(0, half, config.ngram, dtype=np.int64) for stream in streams])
        + 1
    )


def _splitmix64(state: int, count: int) -> int:
    """Returns the count-th number, from 1, that splitmix64 generates from this state."""
    x = (state + 0x9E3779B97F4A7C15 * count) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@kernel(numba="rorqual.kernels.engram:hash_rows", triton="rorqual.kernels.triton_hash:hash_rows")
def hash_rows(
    ids: Int[Tensor, "B W"],
    reach: Int[Tensor, "B T"] | None,
    canonical_map: Int[Tensor, " V"],
    multipliers: Int[Tensor, "Lm N"],
    primes: Int[Tensor, "Lm O J"],
    offsets: Int[Tensor, "Lm R"],
    pad: int,
    out: Int[Tensor, "Lm B T R"] | None = None,
    scratch: dict[str, Any] | None = None,
) -> Int[Tensor, "Lm B T R"]:
    """Computes the rows of T tokens in every Engram layer from W = N-1 + T raw ids.

    The ids are those of the tokens and of the ones before them. reach[b, t] is the number of
    earlier tokens that token t may look back at (None: all N-1); the others are replaced by `pad`,
    a canonical id. Rows are order-major, then by head. `out` is contiguous memory for them;
    `scratch` is a dict in which a kernel stores what it derived from these tensors. IndexError if
    an id has no canonical id (-1 in the map, or outside it).
    """
    orders = primes.shape[1]
    time = ids.shape[1] - primes.shape[1]
    strange = _strange(ids, canonical_map).any()
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        # This does not wait for the device.
        torch._assert_async(~strange, "Engram: an id has no canonical id")
    elif strange:
        raise IndexError("an id has no canonical id")
    canonical = canonical_map[ids].long()
    mix = canonical[:, orders:] * multipliers[:, 0, None, None]  # [Lm, B, T]
    rows = []
    for k in range(1, orders + 1):
        earlier = canonical[:, orders - k : orders - k + time]
        if reach is not None:
            earlier = torch.where(reach >= k, earlier, pad)
        mix = mix ^ (earlier * multipliers[:, k, None, None])
        rows.append(mix[..., None] % primes[:, k - 1, None, None])  # [Lm, B, T, J]
    return torch.add(torch.cat(rows, dim=-1), offsets[:, None, None], out=out)


@kernel(numba="rorqual.kernels.engram:follow_rows")
def follow_rows(
    ids: Int[Tensor, "B T"],
    window_ids: Int[Tensor, "B L"] | None,
    column: int,
    canonical_map: Int[Tensor, " V"],
    multipliers: Int[Tensor, "Lm N"],
    primes: Int[Tensor, "Lm O J"],
    offsets: Int[Tensor, "Lm R"],
    pad_id: int,
    out: Int[Tensor, "Lm B T R"] | None = None,
    scratch: dict[str, Any] | None = None,
) -> Int[Tensor, "Lm B T R"]:
    """Computes hash_rows of `ids` and writes the ids into `window_ids` from column `column` on.

    The columns left of `column` hold the ids before them. Without `window_ids` the raw id `pad_id`
    precedes them.
    """
    before = primes.shape[1]
    time = ids.shape[1]
    if window_ids is None:
        window = F.pad(ids, (before, 0), value=pad_id)
    else:
        window_ids[:, column : column + time] = ids
        window = window_ids[:, column - before : column + time]
    return hash_rows(window, None, canonical_map, multipliers, primes, offsets, 0, out, scratch)


def _strange(ids: Tensor, canonical_map: Tensor) -> Tensor:
    """Marks the ids that have no canonical id: outside of the map, or -1 in it."""
    top = len(canonical_map) - 1
    return (ids < 0) | (ids > top) | (canonical_map[ids.clamp(0, top)] < 0)


class Addresses(nn.Module):
    """Hashes raw ids to the rows of every Engram layer, before the first block.

    The rows are computed once for all layers. Multipliers, primes, the canonical map and its
    sha-256 are saved with the model. A checkpoint in which they differ from this model's is
    refused, with the names of those that differ.
    """

    multipliers: Tensor
    primes: Tensor
    offsets: Tensor
    canonical_map: Tensor
    canonical_sha256: Tensor

    def __init__(
        self,
        config: EngramConfig,
        canonical_map: Int[Tensor, " V"] | Int[np.ndarray, " V"] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Takes the tokenizer's `canonical_map`; without one each raw id is its own canonical id.

        A checkpoint that is loaded later brings its map. A model vocabulary beyond the map's leaves
        raw ids without a canonical id; they are refused when they occur.
        """
        super().__init__()
        self.config = config
        self.has_canonical_map = config.canonical and canonical_map is not None
        self._staging = Staging()
        self._scratch: dict[str, Any] = {}
        if not self.has_canonical_map and vocab_size is None:
            raise ValueError(
                "Addresses: got neither a canonical map nor a vocabulary, expected one"
            )
        canonical = (
            canonical_map if self.has_canonical_map else torch.arange(vocab_size or 0, device="cpu")
        )
        canonical_ids = torch.as_tensor(canonical, device="cpu").numpy().astype(np.int32)
        size = len(canonical_ids) if vocab_size is None else vocab_size
        if len(canonical_ids) > size:
            raise ValueError(
                f"canonical map: got {len(canonical_ids)} ids, "
                f"expected at most the model's vocabulary of {size}"
            )
        self._adopt(
            np.concatenate([canonical_ids, np.full(size - len(canonical_ids), -1, dtype=np.int32)])
        )

    def _adopt(self, canonical_map: np.ndarray) -> None:
        """Computes and registers everything that follows from the config and this map."""
        canonical = canonical_map[canonical_map >= 0]
        if (
            not len(canonical)
            or canonical_map.min() < -1
            or len(np.unique(canonical)) != canonical.max() + 1
        ):
            raise ValueError(
                "canonical map: got gaps or negative ids, "
                "expected every number from 0 up to the largest"
            )
        missing = self.config.missing_id
        if missing >= len(canonical_map) or canonical_map[missing] < 0:
            raise self.config.unknown_missing_id(len(canonical))
        primes = np.array(head_primes(self.config), dtype=np.int64)  # [Lm, N-1, J]
        flat = primes.reshape(len(primes), -1)  # [Lm, R]
        digest = hashlib.sha256(canonical.astype("<i4").tobytes()).digest()
        self.pad = int(canonical_map[missing])
        self._exact: dict[str, np.ndarray] = {
            "multipliers": draw_multipliers(self.config, int(canonical.max()) + 1),
            "primes": primes,
            "canonical_map": canonical_map,
            "canonical_sha256": np.frombuffer(digest, dtype=np.uint8).copy(),
            "offsets": np.cumsum(flat, axis=1) - flat,
        }
        for name, value in self._exact.items():
            self.register_buffer(
                name, torch.tensor(value, device="cpu"), persistent=name != "offsets"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "Addresses":
        """Moves the buffers as any module does, and restores their values after `to_empty`."""
        super()._apply(fn, recurse)
        self._scratch.clear()
        for name, value in self._exact.items():
            if (buffer := getattr(self, name)).device.type != "meta":
                buffer.copy_(torch.from_numpy(value))
        return self

    def fingerprint(self) -> dict[str, Any]:
        """Returns what determines every address, as JSON values.

        The sha-256 is of the map as little-endian int32.
        """
        digest = self._exact["canonical_sha256"].tobytes().hex()
        return {name: self._exact[name].tolist() for name in ("multipliers", "primes")} | {
            "canonical_sha256": digest
        }

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Takes a checkpoint's canonical map if this model has none, and refuses other addresses.

        Multipliers, primes and the map decide which rows an n-gram reads, so with other ones the
        model would look up other rows. ValueError names those that differ; tensors on the meta
        device are not compared.
        """
        saved = {
            name: state_dict[prefix + name] for name in self._exact if prefix + name in state_dict
        }
        read = {name: value.cpu().numpy() for name, value in saved.items() if not value.is_meta}
        if (
            self.config.canonical
            and not self.has_canonical_map
            and len(read.get("canonical_map", ())) == len(self.canonical_map)
        ):
            device = self.canonical_map.device
            self._adopt(read["canonical_map"])
            self.to(device if device.type != "meta" else "cpu")
        same = {name: np.array_equal(value, self._exact[name]) for name, value in read.items()}
        differ = [name for name in ("multipliers", "primes") if not same.get(name, True)]
        if not (same.get("canonical_map", True) and same.get("canonical_sha256", True)):
            differ.append("canonical map")
        if differ:
            got = (
                f"got a checkpoint with other {' and other '.join(differ)} than this model's, "
                "expected the same"
            )
            raise ValueError(
                f"Engram: {got}: take its tokenizer and its engram layers, "
                "rows_per_head, heads, seed and generator"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> Appended:
        """Returns an empty cache for the raw ids of every sequence."""
        return Appended(capacity, before=self.config.ngram - 1, fill=self.config.missing_id)

    def lookup_mask(self, ids: Int[Tensor, "B T"], ctx: Context) -> Bool[Tensor, "B T"] | None:
        """Returns False at padding and dead tokens, where the gate is 0; None if there are none."""
        if not self.config.dead_tokens:
            return ctx.valid
        alive = ~torch.isin(ids, torch.tensor(self.config.dead_tokens, device=ids.device))
        return alive if ctx.valid is None else alive & ctx.valid

    def forward(
        self, ids: Int[Tensor, "B T"], ctx: Context, history: Appended | None = None
    ) -> Int[Tensor, "Lm B T R"]:
        """Computes row ids into each layer's table and appends the ids to `history`.

        `history` holds the ids of earlier calls. Missing context (before the start, across a dead
        token or the beginning of a document) is replaced by the pad id. If there is an
        eos_id it is used in place of the pad id, and what lies before an earlier eos_id is missing,
        too.

        ValueError for an id that the tokenizer does not have, unless it is padding.
        """
        ids = ids.long()
        missing = self.config.missing_id
        if ctx.valid is not None:
            ids = torch.where(ctx.valid, ids, missing)
        # A look into this dictionary is faster than an attribute of a module.
        buffers: dict[str, Any] = self._buffers
        exact = (
            buffers["canonical_map"],
            buffers["multipliers"],
            buffers["primes"],
            buffers["offsets"],
        )
        out = self._memory(ids)
        try:
            if (starts := self._stored_at(ids, ctx, history)) is not None:
                return follow_rows(ids, *starts, *exact, missing, out, self._scratch)
            if history is None:
                window = F.pad(ids, (self.config.ngram - 1, 0), value=missing)
            else:
                history.append(ids, ctx)
                window = history.window(ctx, ids.shape[1])
            reach = self._reach(window, ctx)
            return hash_rows(window, reach, *exact, self.pad, out, self._scratch)
        except IndexError:
            window_ids = (
                ids
                if history is None or history.stored is None
                else torch.cat([ids.flatten(), history.stored.flatten()])
            )
            got = window_ids[_strange(window_ids, self.canonical_map)][0].item()
            canonical = (self.canonical_map >= 0).sum().item()
            raise ValueError(
                f"Engram: got id {got}, expected one of the {canonical} that the tokenizer has"
            ) from None

    def _memory(self, ids: Tensor) -> Tensor | None:
        """Returns memory for the rows of a long call on a CPU, reused by the next call.

        Fresh pages cost more than the hash.
        """
        layers, width = self.offsets.shape
        if ids.numel() < WORTH_KEEPING or not ids.is_cpu or torch.compiler.is_compiling():
            return None
        return self._staging.take(layers * ids.numel(), width, torch.int64).view(
            layers, *ids.shape, width
        )

    def _stored_at(
        self, ids: Tensor, ctx: Context, history: Appended | None
    ) -> tuple[Tensor | None, int] | None:
        """Returns where these ids are stored, if they simply follow those before.

        That is so if nothing limits any look-back and all sequences have the same length.
        """
        document_ids = ctx.key_document_ids if self.config.end_of_document else None
        stopped = self.config.dead_tokens or self.config.eos_id is not None
        if document_ids is not None or ctx.starts is not None or stopped:
            return None
        if history is None:
            return None, 0
        return history.reserve(ids, ctx.key_count), history.before + ctx.past

    def _reach(self, window: Tensor, ctx: Context) -> Tensor | None:
        """Computes how many earlier tokens each token may look back at, int64 [B, T].

        Returns None if nothing limits any look-back.
        """
        stops = []  # [B, W], True where the look-back of the tokens after it must end
        width = window.shape[1]
        before = self.config.ngram - 1
        document_ids = ctx.documents_before(before) if self.config.end_of_document else None
        if self.config.dead_tokens:
            stops.append(
                torch.isin(window, torch.tensor(self.config.dead_tokens, device=window.device))
            )
        if self.config.eos_id is not None:
            stops.append(window == self.config.eos_id)
        if document_ids is not None:
            stops.append(F.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1)))
        if not stops:
            return None
        stop = torch.stack(stops).any(0)
        # [N-1, B, T]
        clear = torch.stack([~stop[:, before - k : width - k] for k in range(1, before + 1)])
        return clear.long().cumprod(0).sum(0)
