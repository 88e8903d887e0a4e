from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.layers.cache import Appended, Bundle, Past, Recent

CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("new"), st.integers(0, 9)),
        st.tuples(st.just("long"), st.integers(30, 60)),
        st.tuples(st.just("crop"), st.integers(0, 5)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("reset"), st.none()),
    ),
    max_size=14,
)


def draw(time: int, seed: int) -> torch.Tensor:
    return torch.randn(2, time, 3, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(calls=CALLS, capacity=st.integers(0, 40))
def test_appended_is_concatenation(calls, capacity):
    kept, expected = Appended(capacity), torch.empty(2, 0, 3)
    for seed, (verb, value) in enumerate(calls):
        if verb in ("new", "long"):
            expected = torch.cat([expected, draw(value, seed)], 1)
            assert torch.equal(kept.append(draw(value, seed)), expected)
        elif verb == "crop":
            value = min(value, kept.length)
            kept.crop(value)
            expected = expected[:, : expected.shape[1] - value]
        elif verb == "select":
            kept.select(torch.tensor(value))
            expected = expected[value]
        else:
            kept.reset()
            expected = expected[:, :0]
        assert kept.length == expected.shape[1]


@settings(max_examples=100, deadline=None)
@given(calls=CALLS, count=st.integers(0, 6))
def test_recent_is_the_tail_of_the_concatenation(calls, count):
    kept, expected = Recent(count, slack=5, fill=7.0), torch.full((2, count, 3), 7.0)
    for seed, (verb, value) in enumerate(calls):
        if verb in ("new", "long"):
            expected = torch.cat([expected, draw(value, seed)], 1)
            assert torch.equal(
                kept.extend(draw(value, seed)), expected[:, expected.shape[1] - count - value :]
            )
        elif verb == "crop":
            value = min(value, kept.length, kept.known)
            try:
                kept.crop(value)
            except ValueError:
                continue
            expected = expected[:, : expected.shape[1] - value]
        elif verb == "select":
            kept.select(torch.tensor(value))
            expected = torch.cat(
                [expected[value][:, :count].fill_(7.0), expected[value][:, count:]], 1
            )
        else:
            kept.reset()
            expected = torch.full((2, count, 3), 7.0)
        assert kept.length == expected.shape[1] - count


def test_recent_goes_back_as_far_as_slack():
    kept = Recent(3, slack=4)
    kept.extend(draw(50, 0))
    kept.crop(4)
    assert torch.equal(kept.extend(draw(1, 1))[:, :3], draw(50, 0)[:, 43:46])
    with pytest.raises(ValueError, match="got 9 tokens to forget"):
        kept.crop(9)


def test_recent_forgets_everything_while_everything_is_held():
    kept = Recent(3, slack=4, fill=-1)
    kept.extend(draw(5, 0))
    kept.crop(5)
    assert torch.equal(kept.extend(draw(1, 1))[:, :3], torch.full((2, 3, 3), -1.0))


def test_a_prefilled_buffer_is_not_moved():
    kept = Appended(capacity=100)
    first = kept.append(draw(60, 0)).data_ptr()
    assert kept.append(draw(40, 1)).data_ptr() == first
    assert kept.append(draw(1, 2)).data_ptr() != first
    assert kept.buffer is not None and kept.buffer.shape[1] == 200


def test_select_changes_the_batch():
    kept, recent = Appended(), Recent(2)
    kept.append(draw(4, 0))
    recent.extend(draw(4, 0))
    for container in (kept, recent):
        container.select(torch.tensor([1, 1, 0]))
    assert torch.equal(kept.append(torch.zeros(3, 0, 3)), draw(4, 0)[[1, 1, 0]])
    assert torch.equal(recent.extend(torch.zeros(3, 0, 3)), draw(4, 0)[[1, 1, 0], 2:])


@pytest.mark.parametrize("container, verb", [(Appended(), "append"), (Recent(2), "extend")])
def test_another_batch_is_refused(container, verb):
    getattr(container, verb)(draw(4, 0))
    with pytest.raises(ValueError, match="got a batch of 1, expected the 2 rows"):
        getattr(container, verb)(draw(1, 0)[:1])
    container.reset()
    getattr(container, verb)(draw(1, 0)[:1])


@pytest.mark.parametrize("container", [Appended(), Recent(2)])
def test_a_batch_before_reset_does_not_bind_a_selection(container):
    """Selects from a larger batch whose tokens are still to come.

    The empty buffer still has the size of the smaller batch before.
    """
    put = container.append if isinstance(container, Appended) else container.extend
    put(draw(4, 0)[:1])
    container.reset()
    container.select(torch.tensor([2, 0]))
    assert torch.equal(put(draw(4, 1))[:, -4:], draw(4, 1))


def test_documents_named_before_reset_do_not_bind_a_selection():
    past = Past()
    past.append(1, 3, torch.tensor([[0, 0, 1]]), torch.tensor([[False, True, True]]))
    past.reset()
    past.append(3, 1, None, None)
    past.select(torch.tensor([1, 2]))
    documents, present = past.append(2, 1, torch.tensor([[1], [2]]), None)
    assert documents.tolist() == [[0, 1], [0, 2]] and present is None


def test_crop_past_the_start_is_refused():
    kept, past = Appended(), Past()
    kept.append(draw(2, 0))
    past.append(2, 2, None, None)
    for container in (kept, past):
        with pytest.raises(ValueError, match="got 3 tokens to forget, expected 0 to the 2 held"):
            container.crop(3)


def test_nothing_kept_carries_gradients():
    assert not Appended().append(draw(2, 0).requires_grad_()).requires_grad
    assert not Recent(1).extend(draw(2, 0).requires_grad_()).requires_grad


def test_past_goes_on_with_the_last_document():
    past = Past()
    documents, present = past.append(2, 3, torch.tensor([[0, 0, 1], [4, 5, 5]]), None)
    assert present is None
    documents, present = past.append(2, 2, None, torch.tensor([[True, False], [True, True]]))
    assert documents.tolist() == [[0, 0, 1, 1, 1], [4, 5, 5, 5, 5]]
    assert present.tolist() == [[True, True, True, True, False], [True] * 5]
    past.crop(3)
    past.select(torch.tensor([1]))
    documents, present = past.append(1, 1, None, None)
    assert documents.tolist() == [[4, 5, 5]] and present.tolist() == [[True] * 3]
    past.reset()
    assert past.append(1, 2, None, None) == (None, None) and past.length == 2


@dataclass(eq=False)
class Kept(Bundle):
    keys: Appended
    pair: tuple[Appended, None]
    inner: Bundle | None = None


def test_what_is_done_to_a_bundle_is_done_to_all_in_it():
    bundle = Kept(Appended(), (Appended(), None))
    bundle.keys.append(draw(4, 0))
    bundle.pair[0].append(draw(4, 1))
    bundle.select(torch.tensor([1, 0]))
    bundle.crop(1)
    assert torch.equal(bundle.keys.append(draw(0, 0)), draw(4, 0)[[1, 0], :3])
    bundle.reset()
    assert bundle.pair[0].length == 0 and bundle.inner is None


@pytest.mark.parametrize("capacity", [1, 40])
def test_claimed_room_is_what_append_would_have_filled(capacity):
    first, more = torch.randn(2, 5, 3), torch.randn(2, 30, 3)
    plain, claimed = Appended(capacity), Appended(capacity)
    expected = [plain.append(part) for part in (first, more)][-1]
    claimed.append(first)
    for part in more.split(1, 1):
        buffer, at = claimed.claim(1)
        buffer[:, at : at + 1] = part
    assert claimed.length == 35
    torch.testing.assert_close(claimed.buffer[:, :35], expected, rtol=0, atol=0)


def test_an_empty_cache_has_no_room_to_claim():
    kept = Appended(8)
    with pytest.raises(ValueError, match="claim: got an empty cache"):
        kept.claim(1)
    kept.append(torch.randn(2, 1, 3))
    kept.reset()
    with pytest.raises(ValueError, match="claim: got an empty cache"):
        kept.claim(1)
