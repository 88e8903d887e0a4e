"""Tests how published tensors are cut out of our state dict, and copied into it."""

import torch

from rorqual.hub.places import Joined, StateSlice, fill


def test_a_place_is_a_view_in_the_published_shape():
    state = {"experts": torch.arange(24.0).view(2, 3, 4)}
    place_of_one = StateSlice("experts", (1, slice(None), slice(2)), transposed=True)
    view = place_of_one.of(state)
    assert view.shape == (2, 3) and torch.equal(view, state["experts"][1, :, :2].T)
    fill(place_of_one, state, torch.zeros(2, 3))
    assert not state["experts"][1, :, :2].any() and state["experts"][1, :, 2:].all()


def test_one_published_tensor_may_be_several_of_ours():
    state = {"keys": torch.randn(4, 3), "values": torch.randn(2, 3)}
    both = Joined((StateSlice("keys"), StateSlice("values")))
    assert both.name == "keys"
    assert torch.equal(both.of(state), torch.cat([state["keys"], state["values"]]))
    published = torch.randn(6, 3)
    fill(both, state, published)
    assert torch.equal(state["keys"], published[:4]) and torch.equal(state["values"], published[4:])


def test_a_place_is_a_view() -> None:
    state = {"x": torch.arange(24.0).view(2, 3, 4)}
    for tensor_place, expected in (
        (StateSlice("x"), state["x"]),
        (StateSlice("x", (1,)), state["x"][1]),
        (StateSlice("x", (1, slice(None), slice(2)), transposed=True), state["x"][1, :, :2].T),
        (StateSlice("x", (0,), shape=(12,)), state["x"][0].flatten()),
        (StateSlice("x", shape=(6, 1, 4)), state["x"].flatten(0, 1)[:, None]),
    ):
        assert torch.equal(tensor_place.of(state), expected)
    StateSlice("x", (1,), shape=(12, 1)).of(state).zero_()
    assert state["x"][1].eq(0).all() and state["x"][0].sum() == 66
