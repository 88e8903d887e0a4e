"""Keeps the caches of prompts that were read, for prompts that begin with the same tokens.

    cache, length = prefixes.start(ids)     a new cache that holds the first `length` of the ids
    prefixes.add(ids, cache)                keeps a cache that has read these ids

Tokens are compared in pages of PAGE: a page's key is a hash of its ids and of the key of the page
before it, so that one look-up per page finds the longest prefix. A cache that is kept can be
cropped to the end of each of its pages: what others store of the last tokens alone, as Engram's
convolution its inputs, is kept as far back as the prompt goes. The states of delta nets are large,
108 MiB at the sizes of qwen3.8-flash-next: they are kept every STATES tokens, where a chunk ends
with a page, and twice as far apart each time that there are more than delta_net.MAX_STATES. Such
prompts can be left there, or less than the slack of their cache before their end. With drafts only
the latter, since chunks do not end where drafts want it. Where the rotary frequencies depend on the
length of a sequence (dynamic, LongRoPE), its keys are those of no other length, and where MoBA
decodes by full attention a single token is read otherwise than several: such prompts are read in
one piece, and nothing is kept.

The hidden states that MTP drafts from are not kept. Where it does, the last tokens of a prefix, one
a depth, are read again; the caches of its modules are kept as those of the model.

Shared pages are copied, since the compiled layers read the tokens of a sequence side by side; what
that saves and costs is in docs/log.md. Hashed pages: vLLM, arXiv:2309.06180.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from rorqual.layers.cache import Cache
from rorqual.model import LanguageModel

PAGE = 16  # tokens
STATES = 256  # tokens between two states of a delta net that are kept
SPARE = 64  # tokens for which a new cache has space behind the prompt


def pages_of(tokens: int) -> int:
    """Returns how many pages hold so many tokens."""
    return -(-tokens // PAGE)


class Prefixes:
    """The caches of the prompts that were read last, each of one sequence."""

    def __init__(self, model: LanguageModel, *, keep: bool = True, before: int = 0) -> None:
        """Makes an empty store.

        With `keep` False nothing is stored, and every prompt is read. Of a prefix that was found
        the last `before` tokens are read again.
        """
        self._before = before
        moba = model.config.moba
        # Whether the cache of a text does not depend on the pieces in which it was read.
        self.divisible = not model.config.rope.varies and (moba is None or moba.decode != "full")
        self._model = model
        self.keeps = keep and self.divisible
        # Caches in the order of their last use, each with the keys that lead to it.
        self._caches: OrderedDict[int, tuple[Cache, set[bytes]]] = OrderedDict()
        self._by_key: dict[bytes, int] = {}
        self._count = 0

    @property
    def pages(self) -> int:
        """The pages that all caches hold together."""
        return sum(pages_of(cache.length) for cache, _ in self._caches.values())

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory of all caches; it may be read from any thread.

        A state that several share, as behind one prefix, counts once.
        """
        storages: dict[int, int] = {}
        for cache, _ in list(self._caches.values()):
            storages |= cache.storages()
        return sum(storages.values())

    def start(self, ids: Sequence[int], *, find: bool = True) -> tuple[Cache, int]:
        """Returns a new cache for these ids, and how many of them it holds, never all of them.

        With `find` False it holds none: all of them will be read.
        """
        cache = self._model.new_cache(1, capacity=len(ids) + SPARE)
        if self.keeps:
            cache.reserve_prefixes(len(ids), STATES, PAGE)
        # The last id is always read: its logits are wanted.
        keys = keys_of(ids[:-1]) if find else []
        for count, key in reversed(list(enumerate(keys, start=1))):
            if key in self._by_key:
                number = self._by_key[key]
                self._caches.move_to_end(number)
                length = count * PAGE - self._before
                cache.load(self._caches[number][0], length)
                return cache, length
        return cache, 0

    def add(self, ids: Sequence[int], cache: Cache) -> None:
        """Keeps a cache that was made by `start` and has read these ids; it must not change."""
        if not self.keeps:
            return
        keys = [
            key
            for count, key in enumerate(keys_of(ids), start=1)
            if cache.can_load(count * PAGE - self._before)
        ]
        if not keys:
            return
        if keys[-1] in self._by_key:
            self._caches.move_to_end(self._by_key[keys[-1]])
            return
        number = self._count = self._count + 1
        self._caches[number] = cache, set(keys)
        for key in keys:
            before = self._by_key.get(key)
            self._by_key[key] = number
            if before is not None:
                self._caches[before][1].discard(key)
                if not self._caches[before][1]:
                    del self._caches[before]

    def shrink(self, pages: int) -> None:
        """Drops the caches that were not used for longest until the rest holds at most `pages`."""
        while self._caches and self.pages > max(0, pages):
            _, (_, keys) = self._caches.popitem(last=False)
            for key in keys:
                del self._by_key[key]


def keys_of(ids: Sequence[int]) -> list[bytes]:
    """Returns the key of every full page of the ids."""
    keys = list[bytes]()
    key = b""
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        page = np.asarray(ids[start : start + PAGE], np.int64).tobytes()
        key = hashlib.sha256(key + page).digest()
        keys.append(key)
    return keys
