"""Tests the containers of a cache against concatenation, sequence by sequence."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.layers.cache import Appended, BlockCache, Bundle, Cache, Past, Recent
from rorqual.layers.context import Span

CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("new"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("long"), st.integers(30, 60), st.booleans()),
        st.tuples(st.just("crop"), st.lists(st.integers(0, 6), min_size=2, max_size=2)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("join"), st.integers(0, 20)),
        st.tuples(st.just("reset")),
    ),
    max_size=14,
)


def draw(time: int, seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, time, 3, generator=torch.Generator().manual_seed(seed))


def cache_of(cached, batch: int = 2) -> Cache:
    """Returns a model's cache that holds one container."""
    return Cache([BlockCache(cached)], Past(batch))


def put(cache: Cache, new: torch.Tensor, counts: list[int] | None = None, verb: str = "append"):
    """Stores new tokens as a forward pass does, and counts them."""
    past = cache.past
    lengths = None if counts is None else torch.tensor(counts)
    span = Span(past.length, past.starts("cpu"), lengths)
    result = getattr(cache.layers[0].attention, verb)(new, span)
    past.append([new.shape[1]] * len(new) if counts is None else counts)
    return result


class Script:
    """Runs calls on a cache and on lists of each sequence's tokens."""

    def __init__(self, cached, make) -> None:
        self.cache = cache_of(cached)
        self.make = make
        self.sequences = [torch.empty(0, 3), torch.empty(0, 3)]

    def feed(self, seed: int, time: int, ragged: bool, verb: str) -> None:
        new = draw(time, seed)
        before = [len(sequence) for sequence in self.sequences]
        counts = [time, time // 2] if ragged else None
        result = put(self.cache, new, counts, verb)
        for b, sequence in enumerate(self.sequences):
            self.sequences[b] = torch.cat(
                [sequence, new[b, : time if counts is None else counts[b]]]
            )
        self.check(result, before, counts or [time, time])
        assert self.cache.lengths == tuple(map(len, self.sequences))

    def run(self, calls, verb: str) -> None:
        for seed, (name, *values) in enumerate(calls):
            if name in ("new", "long"):
                self.feed(seed, *values, verb)
            elif name == "crop":
                self.crop(
                    [
                        min(n, len(sequence))
                        for n, sequence in zip(values[0], self.sequences, strict=True)
                    ]
                )
            elif name == "select":
                self.cache.select(torch.tensor(values[0]))
                self.sequences = [self.sequences[sequence] for sequence in values[0]]
            elif name == "join":
                self.join(values[0], seed, verb)
            else:
                self.cache.reset()
                self.sequences = [sequence[:0] for sequence in self.sequences]

    def crop(self, counts: list[int]) -> None:
        try:
            self.cache.crop(counts)
        except ValueError:
            assert self.cache.lengths == tuple(map(len, self.sequences))
            return
        self.sequences = [
            sequence[: len(sequence) - n]
            for sequence, n in zip(self.sequences, counts, strict=True)
        ]

    def join(self, time: int, seed: int, verb: str) -> None:
        """Replaces the second sequence by one of another cache."""
        other = cache_of(self.make(), 1)
        if time:
            put(other, draw(time, seed, 1), None, verb)
        self.cache.select(torch.tensor([0]))
        if not time or not len(self.sequences[0]):
            # An empty container has no shape to join.
            self.cache = cache_of(self.make())
            self.sequences = [sequence[:0] for sequence in self.sequences]
            return
        self.cache.join(other)
        self.sequences[1] = draw(time, seed, 1)[0]


@settings(max_examples=100, deadline=None)
@given(calls=CALLS, capacity=st.integers(0, 40))
def test_appended_is_concatenation(calls, capacity):
    script = Script(Appended(capacity), lambda: Appended(capacity))

    def check(result, before, counts):
        for b, sequence in enumerate(script.sequences):
            assert torch.equal(result[b, : len(sequence)], sequence)
        assert result.isfinite().all()

    script.check = check
    script.run(calls, "append")


@settings(max_examples=100, deadline=None)
@given(calls=CALLS, before=st.integers(0, 5))
def test_a_window_is_the_end_of_the_concatenation(calls, before):
    def make():
        return Appended(before=before, fill=7)

    script = Script(make(), make)

    def append(new, span):
        cached = script.cache.layers[0].attention
        Appended.append(cached, new, span)
        return cached.window(span, new.shape[1])

    def check(result, lengths, counts):
        for b, sequence in enumerate(script.sequences):
            padded = torch.cat([torch.full((before, 3), 7.0), sequence])
            end = lengths[b] + counts[b]
            assert torch.equal(result[b, : before + counts[b]], padded[lengths[b] : before + end])

    script.check = check
    for seed, (name, *values) in enumerate(calls):
        if name in ("new", "long"):
            script.cache.layers[0].attention.append = append
            script.feed(seed, *values, "append")
            del script.cache.layers[0].attention.append
        else:
            script.run([(name, *values)], "append")


@settings(max_examples=150, deadline=None)
@given(calls=CALLS, count=st.integers(0, 6))
def test_recent_is_the_tail_of_the_concatenation(calls, count):
    script = Script(Recent(count, slack=5), lambda: Recent(count, slack=5))

    def check(result, before, counts):
        for b, sequence in enumerate(script.sequences):
            padded = torch.cat([torch.zeros(count, 3), sequence])
            expected = padded[before[b] : before[b] + count + counts[b]]
            assert torch.equal(result[b, : count + counts[b]], expected)

    script.check = check
    script.run(calls, "extend")


def test_recent_goes_back_as_far_as_slack():
    cache = cache_of(Recent(3, slack=4))
    put(cache, draw(50, 0), verb="extend")
    cache.crop(4)
    assert torch.equal(put(cache, draw(1, 1), verb="extend")[:, :3], draw(50, 0)[:, 43:46])
    with pytest.raises(ValueError, match=r"got 9 tokens to remove, expected 0 to 1, or all 47"):
        cache.crop(9)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        cache.crop([0, 2])
    assert cache.lengths == (47, 47)
    cache.crop([47, 1])
    assert cache.lengths == (0, 46)


def test_a_cache_that_holds_more_goes_back_as_far():
    cache = cache_of(Recent(3, slack=4))
    cache.reserve_slack(30)
    put(cache, draw(50, 0), verb="extend")
    with pytest.raises(
        ValueError, match="reserve_slack: got a cache of 50 tokens, expected an empty one"
    ):
        cache.reserve_slack(40)
    cache.crop(30)
    assert torch.equal(put(cache, draw(1, 1), verb="extend")[:, :3], draw(50, 0)[:, 17:20])


def test_a_prefilled_buffer_is_not_moved():
    cache = cache_of(Appended(capacity=100))
    first = put(cache, draw(60, 0)).data_ptr()
    assert put(cache, draw(40, 1)).data_ptr() == first
    assert put(cache, draw(1, 2)).data_ptr() != first
    assert cache.layers[0].attention.buffer.shape[1] == 200


def test_select_changes_the_batch():
    for cached, verb in ((Appended(), "append"), (Recent(4), "extend")):
        cache = cache_of(cached)
        put(cache, draw(4, 0), verb=verb)
        cache.select(torch.tensor([1, 1, 0]))
        assert torch.equal(put(cache, torch.zeros(3, 0, 3), verb=verb), draw(4, 0)[[1, 1, 0]])


def test_another_batch_is_refused_unless_nothing_is_cached():
    past = Past(2)
    past.take(3)
    past.append([1, 2, 3])
    with pytest.raises(ValueError, match="got a batch of 1, expected the 3 sequences"):
        past.take(1)
    past.reset()
    past.take(1)
    assert past.lengths == [0]


def test_sequences_of_different_lengths_have_starts_of_their_own():
    past = Past(2)
    assert past.starts("cpu") is None
    past.append([3, 5])
    assert past.starts("cpu").tolist() == [3, 5]
    past.crop([0, 2])
    assert past.starts("cpu") is None and past.length == 3
    with pytest.raises(ValueError, match="got 4 tokens to remove, expected 0 to the 3 cached"):
        past.crop([4, 0])
    assert past.lengths == [3, 3]


def test_nothing_cached_carries_gradients():
    cache = cache_of(Appended())
    assert not put(cache, draw(2, 0).requires_grad_()).requires_grad
    cache = cache_of(Recent(1))
    put(cache, draw(2, 0).requires_grad_(), verb="extend")
    assert not put(cache, draw(2, 1), verb="extend").requires_grad


@dataclass(eq=False)
class Nested(Bundle):
    keys: Appended
    pair: tuple[Appended, None]
    inner: Bundle | None = None


def test_what_is_done_to_a_bundle_is_done_to_all_in_it():
    def make():
        return Nested(Appended(), (Appended(), None), BlockCache(Recent(4)))

    bundle = make()
    other = make()
    span = Span(0, None)
    for each, seed in ((bundle, 0), (other, 1)):
        each.keys.append(draw(4, seed), span)
        each.pair[0].append(draw(4, seed), span)
        each.inner.attention.extend(draw(4, seed), span)
    bundle.select(torch.tensor([1]), 4)
    bundle.join(other, ([4, 4], [4, 4]))
    expected = torch.cat([draw(4, 0)[[1]], draw(4, 1)])
    span = Span(4, None)
    for item in (bundle.keys, bundle.pair[0]):
        assert torch.equal(item.append(torch.zeros(3, 0, 3), span), expected)
    assert torch.equal(bundle.inner.attention.extend(torch.zeros(3, 0, 3), span), expected)


def test_reserved_space_is_what_append_would_have_filled():
    first = torch.randn(2, 5, 3)
    more = torch.randn(2, 30, 3)
    for capacity in (1, 40):
        cached = Appended(capacity)
        cached.append(first, Span(0, None))
        for t in range(30):
            cached.reserve(first, 6 + t)[:, 5 + t] = more[:, t]
        assert torch.equal(cached.buffer[:, :35], torch.cat([first, more], 1))


def test_bytes_of_a_cache_are_those_of_its_memory():
    """A sequence that left and columns that nothing is stored in count, too."""
    cache = cache_of(Appended(capacity=10))
    assert cache.allocated_bytes == 0
    put(cache, draw(4, 0))
    # 16 columns of 3 float32 numbers
    sequence = 16 * 3 * 4
    assert cache.allocated_bytes == 2 * sequence
    cache.select(torch.tensor([1]))
    assert cache.allocated_bytes == 2 * sequence
    other = cache_of(Appended(capacity=10))
    put(other, draw(4, 1))
    cache.join(other)
    assert cache.allocated_bytes == 4 * sequence
    cache.reset()
    assert cache.allocated_bytes == 0
