"""Tests that a place is the part of our state that it says, in the published shape."""

import torch

from rorqual.hub.places import Place


def test_a_place_is_a_view() -> None:
    state = {"x": torch.arange(24.0).view(2, 3, 4)}
    for tensor_place, expected in (
        (Place("x"), state["x"]),
        (Place("x", (1,)), state["x"][1]),
        (Place("x", (1, slice(None), slice(2)), transposed=True), state["x"][1, :, :2].T),
        (Place("x", (0,), shape=(12,)), state["x"][0].flatten()),
        (Place("x", shape=(6, 1, 4)), state["x"].flatten(0, 1)[:, None]),
    ):
        assert torch.equal(tensor_place.of(state), expected)
    Place("x", (1,), shape=(12, 1)).of(state).zero_()
    assert state["x"][1].eq(0).all() and state["x"][0].sum() == 66
